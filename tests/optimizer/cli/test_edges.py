"""The command line at its edges: what it reads is never written over, what it cannot open is said in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest

from planish.optimizer.cli.display import print_table
from tests.optimizer.cli.test_bad_input import BAD_INPUT, USAGE, refused

PIPELINE = ("--pipeline", "eliminate-identities")


def model_with_weights_in(path: Path, data: str) -> Path:
    """A product whose matrix lies in the file ``data`` beside the graph, or in a folder there."""
    weight = np.random.default_rng(0).standard_normal((512, 600)).astype(np.float32)
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "W"], ["y"])],
        "product",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 512])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 600])],
        [nh.from_array(weight, "W")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    (path.parent / data).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


@pytest.mark.parametrize(("data", "out"), [("b.onnx.data", "b.onnx"), ("weights.onnx", "weights.onnx")])
def test_weights_of_the_source_are_not_written_over(data: str, out: str, tmp_path: Path) -> None:
    source = model_with_weights_in(tmp_path / "a.onnx", data)
    before = (tmp_path / data).read_bytes()
    refused(USAGE, "this would be written over", "opt", source, *PIPELINE, "-o", tmp_path / out)
    assert (tmp_path / data).read_bytes() == before


@pytest.mark.parametrize("command", ["opt", "bisect"])
@pytest.mark.parametrize("out", ["a.onnx", "link.onnx", "../here/a.onnx"])
def test_a_source_is_not_replaced_by_what_is_made_of_it(command: str, out: str, tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    source = model_with_weights_in(place / "a.onnx", "a.onnx.data")
    (place / "link.onnx").symlink_to(source)
    before = {path: path.read_bytes() for path in place.iterdir()}
    refused(USAGE, "this would be written over SOURCE", command, source, *PIPELINE, "-o", place / out)
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_bisect_replaces_no_weights_and_nothing_in_an_output(tmp_path: Path) -> None:
    source = model_with_weights_in(tmp_path / "a.onnx", "b.onnx.data")
    for out in ("b.onnx", "b.onnx.data"):
        refused(
            USAGE, "this would be written over weights of SOURCE", "bisect", source, *PIPELINE, "-o", tmp_path / out
        )
    (tmp_path / "out").mkdir()
    refused(USAGE, "which is only read", "bisect", tmp_path / "out", *PIPELINE, "-o", tmp_path / "out" / "r.onnx")


def test_opt_does_not_replace_what_it_calibrates_on(tmp_path: Path) -> None:
    source = model_with_weights_in(tmp_path / "a.onnx", "w.bin")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 512), np.float32))
    command = ["opt", source, "--pipeline", "smooth-activations", "--keep", "cosine>=0.5", "--calibration"]
    refused(USAGE, "this would be written over --calibration", *command, tmp_path / "x.npz", "-o", tmp_path / "x.npz")


@pytest.mark.parametrize("command", ["opt", "optimize"])
def test_an_output_that_is_a_link_to_a_folder_is_called_one(command: str, tmp_path: Path) -> None:
    source = model_with_weights_in(tmp_path / "a.onnx", "w.bin")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused(BAD_INPUT, "this is a link", command, source, *PIPELINE, "-o", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.slow
def test_weights_inside_the_output_are_not_lost(tmp_path: Path) -> None:
    source = model_with_weights_in(tmp_path / "a.onnx", "out/w.bin")
    (tmp_path / "out" / "planish.json").write_text('{"files": {"w.bin": "0"}}')  # an output that may be replaced
    refused(USAGE, "inside the output folder", "optimize", source, "-o", tmp_path / "out", "--reference", "none")
    assert (tmp_path / "out" / "w.bin").is_file()


@pytest.mark.parametrize("option", ["SOURCE", "--calibration", "--lock", "--depfile"])
def test_an_output_holds_nothing_that_is_read_or_written_beside_it(option: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = out / "checkpoint" if option == "SOURCE" else tiny
    extra: list[object] = []
    if option == "SOURCE":
        shutil.copytree(tiny, source)
    else:
        out.mkdir()
        (out / "texts.txt").write_text("w1 w2")
        extra = [option, out / ("texts.txt" if option == "--calibration" else "new")]
    refused(USAGE, "inside the output folder", "optimize", source, "-o", out, *extra)
    assert source.is_dir()
    assert option == "SOURCE" or [path.name for path in out.iterdir()] == ["texts.txt"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv: root may read everything")
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", pytest.param("tokenizer.json", marks=pytest.mark.breadth)]
)
def test_a_file_that_may_not_be_read_is_named(file: str, tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (source / file).chmod(0)
    unprivileged = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    command = [*unprivileged, sys.executable, "-m", "planish.optimizer.cli", "optimize", source, "-o", tmp_path / "out"]
    done = subprocess.run([*map(str, command), "--reference", "none"], capture_output=True, text=True)
    assert done.returncode == BAD_INPUT, done.stderr
    assert f"{source / file}: this cannot be used (Permission denied)" in done.stderr.splitlines()[-1]


def test_a_source_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    refused(BAD_INPUT, "there is no such file", "opt", tmp_path / "no.onnx", *PIPELINE, "-o", tmp_path / "o.onnx")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of open files are set as Linux has them")
def test_too_many_open_files_are_a_resource_that_ran_out(tiny: Path, tmp_path: Path) -> None:
    command = f"ulimit -n 10; {sys.executable} -m planish.optimizer.cli optimize {tiny} -o {tmp_path / 'out'}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_tables_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a\x1b[31m", ["name"], [["\x07bell\x00"]])
    said = capsys.readouterr().out
    assert "\\x1b[31m" in said
    assert "\\x07bell\\x00" in said
    assert said.replace("\n", "").isprintable()


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_failed_check() -> None:
    command = f"{sys.executable} -m planish.optimizer.cli passes | head -c 0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "141", done.stderr


@pytest.mark.parametrize("operator", ["Range", "ConstantOfShape", "Tile"])
def test_a_long_vector_of_integers_is_not_followed(operator: str, tmp_path: Path) -> None:
    """Inference would hold each of 2^33 numbers as a message: the file is refused in little memory instead."""
    import resource

    inputs: dict[str, list[int | list[int]]]
    inputs = {"Range": [0, 2**33, 1], "ConstantOfShape": [[2**33]], "Tile": [[1], [2**33]]}
    constants = [
        nh.from_array(np.array(number, np.int64), f"c{index}") for index, number in enumerate(inputs[operator])
    ]
    zero = {"value": nh.from_array(np.zeros(1, np.int64))} if operator == "ConstantOfShape" else {}
    nodes = [
        oh.make_node(operator, [constant.name for constant in constants], ["many"], **zero),
        oh.make_node("Cast", ["many"], ["floats"], to=onnx.TensorProto.FLOAT),
        oh.make_node("ReduceMax", ["floats"], ["largest"], keepdims=0),
        oh.make_node("Add", ["x", "largest"], ["y"]),
    ]
    border = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in "xy"]
    graph = oh.make_graph(nodes, "bomb", border[:1], border[1:], constants)
    path = tmp_path / "bomb.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(5, "", "opt", path, "--preset", "exact", "-o", tmp_path / "out.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes
