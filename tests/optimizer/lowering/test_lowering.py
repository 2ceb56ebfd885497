"""Lowering: every architecture of the zoo, both CPU targets, against PyTorch; and files and modules by the same road."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from planish.optimizer import Pipeline
from planish.optimizer.fidelity.inputs import make_inputs, quick
from planish.optimizer.fidelity.metrics import Comparison, compare
from planish.optimizer.fidelity.reference import Reference, noise_floor
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.lowering.components.calls import plain
from planish.optimizer.lowering.export.torch_export import wrap
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.instruments import CompareEach, VerifyEach
from tests.zoo import ZOO, Species, build

NAMES = ["input_ids", "attention_mask", "token_type_ids"]
EVERY_DAY = {
    "bert-text-classification",
    "gpt2-text-classification",
    "llama-feature-extraction",
}
"""Species whose blocks stand for those of others; the rest is left to `make breadth`."""
REFUSED_BY = {("fnet-text-classification", "openvino"): "OpenVINO 2026.4 computes its Fourier transform wrongly"}


def params() -> list[Any]:
    def mark(species: Species) -> Any:
        return pytest.mark.slow if species.name in EVERY_DAY else pytest.mark.breadth

    return [pytest.param(species, marks=mark(species), id=species.name) for species in ZOO]


def reference_of(lowered: Lowered) -> Reference:
    signature = lowered.program.sole()[1]
    inputs = make_inputs(signature)
    answers = lowered.original.answer({"model": inputs}, 1)
    outputs = answers.outputs["model"]
    noise = noise_floor(
        signature, inputs[:1], outputs[:1], None if answers.precise is None else answers.precise["model"]
    )
    return Reference(tuple(inputs), tuple(outputs), noise, "")


def fidelity(lowered: Lowered, reference: Reference, target: str, folder: Path) -> Comparison:
    """Run the `exact` preset under its checks, emit, open, and compare with the reference."""
    model, signature = lowered.program.sole()
    checker, backend = registry.backend("onnxruntime"), registry.backend(target)
    budget = reference.exact_budget()
    watchers = [CompareEach(signature, quick(reference.inputs), lambda _: budget, checker.load), VerifyEach()]
    outcome = Pipeline.parse(presets.pipeline_text("exact", target)).run(model.clone(), watchers)
    folder.mkdir()
    backend.emit(replace(lowered.program, components={"model": outcome.model}), folder)
    engine = backend.open(folder)
    return compare(signature, reference.inputs, reference.outputs, [engine.run(case) for case in reference.inputs])


@pytest.mark.slow
@pytest.mark.parametrize("species", params())
def test_architectures(species: Species, tmp_path: Path) -> None:
    lowered = lower(build(species, tmp_path / "checkpoint"))
    reference = reference_of(lowered)
    assert lowered.program.task == species.task
    assert lowered.program.sole()[1].axes.keys() >= {"batch", "sequence"}
    for target in ("onnxruntime", "openvino"):
        found = fidelity(lowered, reference, target, tmp_path / target)
        violations = reference.exact_budget().violations(found)
        assert bool(violations) == ((species.name, target) in REFUSED_BY), (target, violations)


@pytest.mark.slow
def test_reference_inputs_cover_what_goes_wrong(tiny: Path) -> None:
    lowered = lower(tiny)
    inputs = make_inputs(lowered.program.sole()[1])
    shapes = [case["input_ids"].shape for case in inputs]
    assert shapes == [(3, 20), (1, 2), (1, 48), (1, 48)]
    padded = inputs[0]
    assert [int(row.sum()) for row in padded["attention_mask"]] == [20, 15, 12]
    assert (padded["input_ids"][padded["attention_mask"] == 0] == 1).all()
    assert (padded["input_ids"][padded["attention_mask"] == 1] != 1).all()
    assert all((case["input_ids"] < 99).all() for case in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_are_widened_as_they_are_read(dtype: str, tmp_path: Path) -> None:
    lowered = lower(build(Species("bert", "feature-extraction"), tmp_path / "checkpoint", dtype=dtype))
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.slow
def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModel

    whole = build(Species("bert", "feature-extraction"), tmp_path / "whole")
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    lowered = lower(tmp_path / "shards")
    assert len(lowered.program.provenance.files) > 3
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.slow
def test_another_task_than_the_checkpoint_was_saved_for(tiny: Path, tmp_path: Path) -> None:
    """The encoder of a classifier: its weights carry a prefix, its head is left out."""
    lowered = lower(tiny, "feature-extraction")
    assert [tensor.name for tensor in lowered.program.sole()[1].outputs] == ["last_hidden_state"]
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.slow
def test_weights_that_no_output_depends_on_may_be_absent(tmp_path: Path) -> None:
    """A language model is saved without the pooler that its bare encoder has; the hidden states need none."""
    lowered = lower(build(Species("bert", "fill-mask"), tmp_path / "c"), "feature-extraction")
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.slow
def test_deep_stacks_are_traced_by_their_first_layers(tmp_path: Path) -> None:
    """Seven layers of which two are traced; what is written for the others must read their own weights."""
    deep = Species("bert", "feature-extraction", {"num_hidden_layers": 7})
    lowered = lower(build(deep, tmp_path / "checkpoint"))
    model, _ = lowered.program.sole()
    names = [node.name or "" for node in model.graph if node.op_type == "Attention"]
    assert len(names) == 7
    assert sum("_layer" in name for name in names) == 5
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.breadth
def test_layers_that_differ_are_all_traced(tmp_path: Path) -> None:
    """ModernBERT: every second layer attends to everything, the others to a window."""
    settings = {"num_hidden_layers": 6, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0}
    lowered = lower(build(Species("modernbert", "feature-extraction", settings), tmp_path / "c"))
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5
    assert not any("_layer2" in (node.name or "") for node in lowered.program.sole()[0].graph)


@pytest.mark.slow
def test_lowering_imports_torch_only_when_it_lowers() -> None:
    import subprocess

    script = "import sys, planish.optimizer.driver.optimize; print([m for m in ('torch', 'transformers', 'openvino') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


class Recurrent:
    """Made where torch is there: an LSTM language model with its state as inputs and outputs."""

    def __new__(cls) -> Any:
        import torch

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(50, 12)
                self.lstm = torch.nn.LSTM(12, 16, batch_first=True)
                self.head = torch.nn.Linear(16, 50)

            def forward(self, input_ids: Any, hidden: Any, cell: Any) -> dict[str, Any]:
                out, (hidden, cell) = self.lstm(self.embedding(input_ids), (hidden, cell))
                return {"logits": self.head(out), "hidden_out": hidden, "cell_out": cell}

        torch.manual_seed(0)
        return Model()


@pytest.mark.slow
def test_any_module_with_sample_inputs(tmp_path: Path) -> None:
    import torch

    sample = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "hidden": torch.zeros(1, 2, 16),
        "cell": torch.zeros(1, 2, 16),
    }
    axes: Mapping[str, Mapping[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "hidden": {1: "batch"},
        "cell": {1: "batch"},
    }
    lowered = lower(Recurrent(), sample_inputs=sample, dynamic_axes=axes)
    signature = lowered.program.sole()[1]
    assert [tensor.name for tensor in signature.outputs] == ["logits", "hidden_out", "cell_out"]
    assert signature.input("input_ids").bound == 50
    for target in ("onnxruntime", "openvino"):
        found = fidelity(lowered, reference_of(lowered), target, tmp_path / target)
        assert (found.worst("max_rel") or 0) < 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as torch's first exporter writes it, by opset."""
    import torch
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("exported")
    checkpoint = build(Species("bert", "feature-extraction"), folder / "c")
    model = wrap(
        AutoModel.from_pretrained(checkpoint, attn_implementation="eager"), plain, NAMES, ["last_hidden_state"]
    )
    inputs = tuple(torch.ones(2, 8, dtype=torch.long) for _ in range(3))
    axes = {name: {0: "batch", 1: "sequence"} for name in [*NAMES, "last_hidden_state"]}
    for opset in (11, 14, 17, 18):
        path = folder / f"{opset}.onnx"
        torch.onnx.export(
            model.eval(), inputs, path, dynamo=False, opset_version=opset, input_names=NAMES,
            output_names=["last_hidden_state"], dynamic_axes=axes,
        )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, *(pytest.param(n, marks=pytest.mark.breadth) for n in (14, 17, 18))])
@pytest.mark.filterwarnings("ignore")
def test_files_of_older_opsets_are_raised_and_fused(opset: int, exported: Path, tmp_path: Path) -> None:
    lowered = lower(exported / f"{opset}.onnx")
    assert lowered.program.provenance.notes == (f"raised from opset {opset} to 23",)
    assert lowered.program.sole()[1].input("input_ids").bound == 99
    reference = reference_of(lowered)
    for target in ("onnxruntime", "openvino"):
        found = fidelity(lowered, reference, target, tmp_path / target)
        assert reference.exact_budget().violations(found) == []
    kinds = [node.op_type for node in onnx.load(tmp_path / "onnxruntime" / "model.onnx").graph.node]
    assert [kinds.count(kind) for kind in ("Attention", "LayerNormalization", "Gelu")] == [2, 5, 2]
    assert {"Softmax", "Erf", "Pow"}.isdisjoint(kinds)


@pytest.mark.slow
def test_files_with_external_data(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported / "18.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data.bin", size_threshold=64)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    lowered = lower(tmp_path / "model.onnx")
    assert set(lowered.program.provenance.files) == {"model.onnx", "data.bin", "config.json"}
    assert lowered.program.task == "feature-extraction"
    found = fidelity(lowered, reference_of(lowered), "onnxruntime", tmp_path / "engine")
    assert (found.worst("max_rel") or 0) < 1e-5


@pytest.mark.slow
def test_files_larger_than_two_gigabytes(tmp_path: Path) -> None:
    """A table of 2.2 GB in external data: no protobuf can hold it, and nothing here may try."""
    import onnx.helper as oh

    rows, columns = 550_000, 1000
    tensor = onnx.TensorProto(name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, columns])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "table.bin", "offset": 0, "length": rows * columns * 4}.items():
        tensor.external_data.add(key=key, value=str(value))
    with (tmp_path / "table.bin").open("wb") as file:
        file.truncate(rows * columns * 4)
        file.seek(12 * columns * 4)
        file.write(np.arange(columns, dtype=np.float32).tobytes())
    nodes = [oh.make_node("Gather", ["table", "ids"], ["row"]), oh.make_node("Identity", ["row"], ["r"])]
    ids = oh.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", 1])
    out = oh.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["batch", 1, columns])
    graph = oh.make_graph(nodes, "g", [ids], [out], [tensor])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    lowered = lower(tmp_path / "model.onnx")
    outcome = Pipeline.parse(presets.pipeline_text("exact", "onnxruntime")).run(
        lowered.program.sole()[0], [VerifyEach()]
    )
    engine = registry.backend("onnxruntime").load(outcome.model)
    np.testing.assert_array_equal(engine.run({"ids": np.array([[12]])})["r"][0, 0], np.arange(columns))
