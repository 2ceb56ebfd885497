"""ONNX files: valid ones with a few changes, through `planish opt` and at times `planish optimize`.

What is written must compute what the file computes in ONNX Runtime without optimizations, and nothing may be said on
standard output or error but by Planish.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from planish.optimizer import optimize
from planish.optimizer.driver.opt import OptOptions, optimize_file
from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.fidelity.metrics import visible_part
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.export.onnx_file import read_signature
from planish.optimizer.lowering.original.limited_process import size_at
from planish.optimizer.pipeline import presets
from tests.fuzz import Wrong, seeds
from tests.fuzz.mutations import mutate

logging.getLogger("planish").addHandler(logging.NullHandler())  # what Planish says aloud is no noise
EXACT = sorted(name for name, entry in registry.table(registry.PASSES).items() if entry.load().exact)
_TOLERANCE = 1e-3
"""Far above rounding, far below another formula."""
_WHOLE_SHARE, _EXPORTED_SHARE = 0.02, 0.03
"""Of the cases that go through `optimize`, and of those that begin with a whole exported Transformer."""


def case(seed: int, folder: Path) -> str:
    """Make the file of this seed, optimize it, and compare."""
    rng = random.Random(seed)
    source = write(rng, folder)
    with silence():
        if rng.random() < _WHOLE_SHARE:
            optimize(source, folder / "out", pipeline=_pipeline(rng), reference="none")  # and so without timing
            out = folder / "out" / "onnxruntime" / "model.onnx"
            if not _small(source):
                return "built, not run: nobody knows what it would take"
        else:
            out = folder / "out.onnx"
            optimize_file(source, out, OptOptions(pipeline=_pipeline(rng)))
    compare(source, out)
    return "equal"


def write(rng: random.Random, folder: Path) -> Path:
    """The mutated file, with a file of weights beside it."""
    if rng.random() < _EXPORTED_SHARE:
        model = rng.choice(seeds.exported())()
    else:
        model = onnx.ModelProto.FromString(rng.choice(seeds.small()).SerializeToString())
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3, 4))):
        mutate(rng, model)
    content = bytearray(model.SerializeToString())
    if rng.random() < 0.03:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.01:
        del content[rng.randrange(len(content)) :]
    (folder / "w.bin").write_bytes(rng.randbytes(4096))
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def _pipeline(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return presets.pipeline_text("exact", rng.choice(("onnxruntime", "openvino")))
    return ",".join(rng.choices(EXACT, k=rng.randrange(1, 7)))


def _small(source: Path) -> bool:
    """Whether a file that Planish did not run may be run here."""
    (graph, signature) = lower(source).program.sole()
    return all(size_at(graph, feeds).small for feeds in make_inputs(signature, seed=1)[:2])


@contextmanager
def silence() -> Iterator[None]:
    """Wrong if a library writes to standard output or error of this process."""
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if text.strip():
        raise Wrong(f"a library said: {text.strip()[:200]}")


def compare(source: Path, out: Path) -> None:
    """Wrong if two files have other borders, or give other results for inputs made from the first."""
    original, optimized = _session(source), _session(out)
    if original is None:
        return  # the runtime does not take the file as it stands; Planish repaired it
    if optimized is None:
        raise Wrong("what was written cannot be opened")
    borders = [[port.name for port in (*s.get_inputs(), *s.get_outputs())] for s in (original, optimized)]
    if borders[0] != borders[1]:
        raise Wrong(f"inputs and outputs were {borders[0]}, are {borders[1]}")
    signature = read_signature(source)
    roles = {tensor.name: tensor for tensor in signature.outputs}
    for feeds in make_inputs(signature, seed=1)[:2]:
        try:
            wanted = original.run(None, feeds)
        except Exception:
            continue  # these inputs are not the file's
        for name, one, other in zip(borders[0][-len(wanted) :], wanted, optimized.run(None, feeds), strict=True):
            visible = visible_part(signature, roles[name], feeds, one) if isinstance(one, np.ndarray) else None
            _equal(name, *(array if visible is None else np.where(visible, array, 0) for array in (one, other)))


def _session(path: Path) -> ort.InferenceSession | None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:
        return None


def _equal(name: str, wanted: object, given: object) -> None:
    if isinstance(wanted, list):
        pairs = list(zip(wanted, given if isinstance(given, list) else [], strict=True))
        for one, other in pairs:
            _equal(name, one, other)
        return
    if not isinstance(wanted, np.ndarray) or not isinstance(given, np.ndarray):
        if type(wanted) is not type(given):
            raise Wrong(f"{name} was {type(wanted).__name__}, is {type(given).__name__}")
        return
    if wanted.shape != given.shape or wanted.dtype != given.dtype:
        raise Wrong(f"{name} was {wanted.dtype}{wanted.shape}, is {given.dtype}{given.shape}")
    if wanted.dtype.kind in "fc":
        with np.errstate(all="ignore"):
            scale = np.abs(wanted[np.isfinite(wanted)], dtype=np.float64).max(initial=1e-6)
            same = np.isclose(given, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
    else:
        same = given == wanted
    if not np.all(same):
        raise Wrong(f"{name} differs at {int(np.sum(~np.asarray(same)))} of {wanted.size} places")
