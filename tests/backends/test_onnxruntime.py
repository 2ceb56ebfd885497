"""ONNX Runtime: what is written, and how it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from planish.optimizer.errors import MissingRuntime, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Program
from tests.backends.conftest import contents

FEEDS = {
    "input_ids": np.array([[5, 6, 7]]),
    "attention_mask": np.ones((1, 3), np.int64),
    "token_type_ids": np.zeros((1, 3), np.int64),
}


@pytest.mark.slow
def test_names_are_those_that_loaders_expect(program: Program, tmp_path: Path) -> None:
    registry.backend("onnxruntime").emit(program, tmp_path)
    assert set(contents(tmp_path)) == {"model.onnx", "model.onnx.data"}
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert {value.name for value in graph.input} == set(FEEDS)
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    for value in [*graph.input, *graph.output]:
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim][:2] == ["batch", "sequence"]


def test_large_weights_lie_aligned_beside_the_graph(program: Program, tmp_path: Path) -> None:
    registry.backend("onnxruntime").emit(program, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in outside]
    large = [place for place in places if int(place["length"]) >= 65536]
    assert large != []
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert all(int(place["offset"]) % 65536 == 0 for place in large)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_what_is_written_is_the_same_everywhere_and_names_no_place(
    target: str, program: Program, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        registry.backend(target).emit(program, tmp_path / name)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "other")
    for name, data in one.items():
        for place in (str(tmp_path.parent), str(Path.home()), "site-packages"):
            assert place.encode() not in data, f"{name} names {place}"


def test_options_reach_the_runtime(program: Program, tmp_path: Path) -> None:
    registry.backend("onnxruntime").emit(program, tmp_path)
    one, two = (registry.backend(f"onnxruntime{{threads={count}}}").open(tmp_path) for count in (1, 2))
    options = [engine._session.get_session_options().intra_op_num_threads for engine in (one, two)]  # type: ignore[attr-defined]
    assert options == [1, 2]
    name = "last_hidden_state"
    np.testing.assert_allclose(one.run(FEEDS)[name], two.run(FEEDS)[name], rtol=1e-4, atol=1e-5)


def test_a_provider_that_is_not_there(program: Program, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the provider")
    registry.backend("onnxruntime").emit(program, tmp_path)
    with pytest.raises(MissingRuntime, match="has no CUDAExecutionProvider"):
        registry.backend("onnxruntime{provider=cuda}").open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("onnxruntime{threads=-1}", "threads"),
        ("onnxruntime{threads=99999999}", "threads"),
        ("onnxruntime{threads=99999999999999999999}", "threads"),
        ("openvino{threads=1025}", "threads"),
        ("tensorrt{batch=[1,4,99999999999]}", "batch"),
        ("tensorrt{batch=[8,4,1]}", "sizes must ascend"),
        ("tensorrt{sequence=[0,4,8]}", "sequence"),
        ("onnxruntime{provider=tpu}", "provider"),
        ("onnxruntime{thread=1}", "did you mean threads"),
        ("onnxruntim", "did you mean onnxruntime"),
    ],
)
def test_options_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.backend(text)
    assert message in str(caught.value).replace("'", "")
