"""A peer's own way, in its own environment: python nncf_quantize.py MODEL.onnx CASES.npz OUT.xml."""

import sys
from collections import defaultdict

import nncf
import numpy as np
import openvino as ov

source, cases, out = sys.argv[1:]
model = ov.Core().read_model(source)
names = {port.get_any_name() for port in model.inputs}
found: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
for key, array in np.load(cases).items():
    index, _, name = key.partition("/")
    if name in names:
        found[int(index)][name] = array
data = nncf.Dataset([found[index] for index in sorted(found)])
made = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(found))
ov.save_model(made, out, compress_to_fp16=False)
