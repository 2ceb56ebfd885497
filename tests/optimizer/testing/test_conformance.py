"""Each check of a backend finds the fault that it is for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer.errors import BadInput, CheckFailed, UsageError
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend, Engine, RequiredPass
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Arrays, Program
from planish.optimizer.testing import CHECKS, check_backend, run_check

Fault = tuple[str, Callable[[pytest.MonkeyPatch], object], str]


def presets(monkeypatch: pytest.MonkeyPatch, **found: tuple[Recipe, ...]) -> None:
    monkeypatch.setattr(OnnxRuntime, "presets", found)


def emitting(monkeypatch: pytest.MonkeyPatch, change: Callable[[Program, Path], object]) -> None:
    emit = OnnxRuntime.emit

    def changed(self: OnnxRuntime, program: Program, folder: Path) -> None:
        emit(self, program, folder)
        change(program, folder)

    monkeypatch.setattr(OnnxRuntime, "emit", changed)


def opening(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Engine], Engine]) -> None:
    opened = OnnxRuntime.open
    monkeypatch.setattr(OnnxRuntime, "open", lambda self, path: wrap(opened(self, path)))


class Wrapped(Engine):
    """An engine with a fault."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.engine._run(feeds)


class Shifted(Wrapped):
    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array + np.float32(0.1) for name, array in super()._run(feeds).items()}


class Lenient(Wrapped):
    """Inputs that it does not know are left out."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        names = {tensor.name for tensor in self.inputs}
        return super().run({name: array for name, array in inputs.items() if name in names})


class Raw(Wrapped):
    """What the runtime raises comes through."""

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if feeds["input_ids"].ndim != 2:
            raise RuntimeError("rank")
        return super()._run(feeds)


class Forgetful(Wrapped):
    """Steps begin anew each time."""

    def step(self, inputs: Arrays, cache: object | None = None) -> tuple[dict[str, np.ndarray], object]:
        mask = np.ones_like(inputs["input_ids"])
        return super().step({**inputs, "attention_mask": mask}, None)


class Unselected(Wrapped):
    """Rows of a cache stay where they are."""

    def select(self, cache: object, rows: np.ndarray) -> object:
        return cache


class Shared(Wrapped):
    """Inputs lie in one place, whoever calls."""

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds = feeds
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.005)
        return super()._run(self.feeds)


def requiring(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(OnnxRuntime, "required_passes", (RequiredPass(text, "changed", "any option"),))


def ignoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(self: OnnxRuntime, program: Program, folder: Path) -> None:
        onnx_io.save(program.sole()[0], folder / self.model_file)

    monkeypatch.setattr(OnnxRuntime, "emit", emit)


def opening_only(monkeypatch: pytest.MonkeyPatch, takes: Callable[[Path], bool]) -> None:
    opened = OnnxRuntime.open

    def open_some(self: OnnxRuntime, path: Path) -> Engine:
        if not takes(path):
            raise BadInput("no folder")
        return opened(self, path)

    monkeypatch.setattr(OnnxRuntime, "open", open_some)


def raising(*_: object) -> Any:
    raise RuntimeError("no way")


def renamed(program: Program) -> None:
    program.components["model"].graph.name = "another"


counter = itertools.count()
FAULTS: dict[str, Fault] = {
    "no distribution": ("names", lambda m: m.setattr(OnnxRuntime, "distribution", ""), "distribution is missing"),
    "another name": ("names", lambda m: m.setattr(OnnxRuntime, "name", "other"), "no entry point of the group"),
    "no point": ("files", lambda m: m.setattr(OnnxRuntime, "suffixes", ("onnx",)), "suffixes begin with a point"),
    "text form": ("options", lambda m: m.setattr(OnnxRuntime, "__str__", lambda _: "x{threads=7}"), "equal target"),
    "unknown preset": ("presets", lambda m: presets(m, quick=(Recipe(("fuse-gelu",), why="y"),)), "no preset 'quick'"),
    "no main recipe": ("presets", lambda m: presets(m, fast=()), "0 recipes that are always tried"),
    "no reason": ("presets", lambda m: presets(m, fast=(Recipe(("fuse-gelu",)),)), "does not say why fuse-gelu"),
    "unknown pass": ("presets", lambda m: presets(m, fast=(Recipe(("fuse-glu",), why="y"),)), "unknown pass 'fuse-glu'"),
    "not exact": ("presets", lambda m: presets(m, exact=(Recipe(("quantize-int8",), why="y"),)), "quantize-int8"),
    "nothing missing": ("missing-runtime", lambda m: m.setattr(OnnxRuntime, "missing", staticmethod(lambda: None)), "nothing is miss"),
    "no advice": ("missing-runtime", lambda m: m.setattr(OnnxRuntime, "missing", staticmethod(lambda: "no")), "how to install: no"),
    "several lines": (
        "names", lambda m: m.setattr(OnnxRuntime, "missing", staticmethod(lambda: "install it:\npip")), "neither None nor one line"
    ),
    "a suffix of another type": (
        "names", lambda m: m.setattr(OnnxRuntime, "suffixes", (1,)), r"OnnxRuntime.suffixes is .1,.: 0: Input should be a valid string"
    ),
    "libraries as text": (
        "names", lambda m: m.setattr(OnnxRuntime, "libraries", "onnx"), "libraries is 'onnx': input should be a valid tuple"
    ),
    "an absent library": (
        "names", lambda m: m.setattr(OnnxRuntime, "libraries", ("onnx_runtime_",)), "libraries names onnx_runtime_, which is not installed"
    ),
    "a suffix of two parts": (
        "files", lambda m: m.setattr(OnnxRuntime, "suffixes", (".tar.gz",)), r"no file has the suffix '.tar.gz': that of .* is '.gz'"
    ),
    "a suffix of another": (
        "files", lambda m: m.setattr(OnnxRuntime, "suffixes", (".xml",)), "the suffix .xml are opened by target openvino"
    ),
    "a file in a folder": (
        "files", lambda m: m.setattr(OnnxRuntime, "model_file", "sub/model.onnx"), "'sub/model.onnx' is not the name of a file"
    ),
    "no model in its file": (
        "files", lambda m: m.setattr(OnnxRuntime, "model_file", "engine.onnx"), "file_of gives one file for different components"
    ),
    "one file for all": (
        "files", lambda m: m.setattr(OnnxRuntime, "file_of", lambda *_: "model.onnx"), "file_of gives one file for different"
    ),
    "another file for the model": (
        "files", lambda m: m.setattr(OnnxRuntime, "file_of", lambda *_: _[-1]), r"file_of\('model'\) gives 'model', not model_file"
    ),
    "a recipe alone": (
        "presets", lambda m: m.setattr(OnnxRuntime, "presets", {"exact": Recipe(("fuse-gelu",))}), "exact: Input should be an instance of Seq"
    ),
    "a recipe as text": (
        "presets", lambda m: m.setattr(OnnxRuntime, "presets", {"exact": ("fuse-gelu",)}), "exact.0: Input should be an instance of Recipe"
    ),
    "passes as text": (
        "presets", lambda m: presets(m, fast=(Recipe("fuse-gelu", why="y"),)),  # type: ignore[arg-type]
        "recipe 1 of preset fast has the passes 'fuse-gelu', which is not a tuple of texts; write a comma"
    ),
    "an option of a pass": (
        "presets", lambda m: presets(m, fast=(Recipe(("quantize-weights{bits=no}",), why="y"),)), "recipe 1 of preset fast: pass quantize-weights: option bits"
    ),
    "a pass without end": ("presets", lambda m: presets(m, fast=(Recipe(("fuse-gelu{",), why="y"),)), "recipe 1 of preset fast: expected an option"),
    "required passes ignored": (
        "required-passes", ignoring, "emit.. of onnxruntime{cache=int8} ignores its required_passes; begin it with"
    ),
    "an unknown required pass": (
        "required-passes", lambda m: requiring(m, "quantize-cash"), "required pass 'quantize-cash' of onnxruntime: unknown pass"
    ),
    "a required pass without end": (
        "required-passes", lambda m: requiring(m, "quantize-cache{"), "required pass 'quantize-cache{' of onnxruntime: expected an option"
    ),
    "an option of a required pass": (
        "required-passes", lambda m: requiring(m, "quantize-weights{bits=many}"), "of onnxruntime: pass quantize-weights: option bits"
    ),
    "a required pass as text": (
        "required-passes", lambda m: m.setattr(OnnxRuntime, "required_passes", ("quantize-cache",)), "'quantize-cache', which is no RequiredPass"
    ),
    "an ending of others": (
        "suffixes", lambda m: opening_only(m, lambda path: path.is_dir()), "suffixes has .onnx, and open.. refuses model.onnx: no"
    ),
    "an ending that it does not write": (
        "suffixes", lambda m: m.setattr(OnnxRuntime, "suffixes", (".ort",)), "suffixes has .ort, and open.. refuses single.ort"
    ),
    "a file beside the folder": (
        "emission", lambda m: emitting(m, lambda _, f: (f.parent / "a").touch()), "emit.. writes outside of the folder that it is given: a"
    ),
    "a changed program": (
        "emission", lambda m: emitting(m, lambda p, _: renamed(p)), "emit.. changes the program that it is given .model."
    ),
    "a component more": (
        "emission", lambda m: emitting(m, lambda p, _: p.components.update(more=p.components["model"])), "changes the program .* .components"
    ),
    "mapped raises": (
        "derived-targets", lambda m: m.setattr(OnnxRuntime, "mapped", raising), "RuntimeError in raising .test_conformance.py, line .*: no way"
    ),
    "mapped gives something else": (
        "derived-targets", lambda m: m.setattr(OnnxRuntime, "mapped", lambda _: "x"), r"mapped\(\) gives 'x', not a OnnxRuntime"
    ),
    "no arithmetics": ("derived-targets", lambda m: m.setattr(OnnxRuntime, "arithmetics", ()), "the last of `arithmetics` is not"),
    "another arithmetic": ("derived-targets", lambda m: m.setattr(OnnxRuntime, "arithmetic", 32), "arithmetic is 32, not of type str"),
    "load raises": ("graphs-in-memory", lambda m: m.setattr(OnnxRuntime, "load", raising), "RuntimeError in raising"),
    "open raises": ("opening", lambda m: m.setattr(OnnxRuntime, "open", raising), "check opening: RuntimeError in raising"),
    "another file": (
        "emission", lambda m: emitting(m, lambda _, f: (f / "model.onnx").rename(f / "m")), "emit.. writes no model.onnx"
    ),
    "other bytes": (
        "emission", lambda m: emitting(m, lambda _, f: (f / "a").write_text(str(next(counter)))), "other bytes into a"
    ),
    "other files": (
        "emission", lambda m: emitting(m, lambda _, f: (f / str(next(counter))).touch()), "two emissions write other files"
    ),
    "its place": (
        "emission", lambda m: emitting(m, lambda _, f: (f / "a").write_text(str(f.parent))), "names the folder"
    ),
    "an input too few": ("opening", lambda m: opening(m, short), "the engine has the inputs"),
    "other outputs": ("outputs", lambda m: opening(m, Shifted), "outputs differ from the reference: max_rel"),
    "unknown inputs": ("refusals", lambda m: opening(m, Lenient), "an unknown input: it is taken"),
    "an exception": ("refusals", lambda m: opening(m, Raw), "tokens of rank 3: it raises RuntimeError"),
    "no cache": ("decoder", lambda m: opening(m, Forgetful), "steps behind a cache differ"),
    "rows of a cache": ("decoder", lambda m: opening(m, Unselected), "steps behind a cache differ"),
    "one place": ("threads", lambda m: opening(m, Shared), "disturb each other"),
}  # fmt: skip


def short(engine: Engine) -> Engine:
    engine.inputs = engine.inputs[:1]
    return engine


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, breaks, message = FAULTS[fault]
    breaks(monkeypatch)
    with pytest.raises((CheckFailed, UsageError), match=message):
        run_check(name, OnnxRuntime())


def test_every_check_has_a_fault() -> None:
    assert {name for name, *_ in FAULTS.values()} >= set(CHECKS) - {"components"}


def test_components_that_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    emitting(monkeypatch, lambda _, folder: (folder / "decoder_model.onnx").unlink(missing_ok=True))
    with pytest.raises(CheckFailed, match=r"emit\(\) writes no decoder_model\.onnx for the component"):
        run_check("components", OnnxRuntime())


def test_what_is_not_claimed_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, Forgetful)
    with pytest.raises(CheckFailed, match="target onnxruntime, check decoder: steps behind"):
        check_backend(OnnxRuntime)
    assert check_backend(OnnxRuntime, without={"decoder": "no decoders"}) == {"decoder": "no decoders"}
    with pytest.raises(UsageError, match="did you mean"):
        check_backend(OnnxRuntime, without={"decoders": "none"})


def test_a_class_that_is_no_dataclass_of_its_own() -> None:
    class Plain(OnnxRuntime):
        pass

    with pytest.raises(CheckFailed, match="Plain is not a frozen dataclass"):
        run_check("options", Plain())


def test_options_need_docstrings() -> None:
    @dataclass(frozen=True)
    class Undocumented(OnnxRuntime):
        name: ClassVar[str] = "undocumented"
        level: int = 0

    with pytest.raises(CheckFailed, match="option level has no docstring"):
        run_check("options", Undocumented())


def test_a_bug_of_the_backend_is_told_in_one_line_with_the_check_that_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(self: Backend, program: Program, folder: Path) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(OnnxRuntime, "emit", emit)
    with pytest.raises(CheckFailed) as caught:
        run_check("emission", OnnxRuntime())
    line = emit.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "target onnxruntime, check emission: "
        f"ZeroDivisionError in emit (test_conformance.py, line {line}): it has no message"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_files_in_the_working_directory_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    emitting(monkeypatch, lambda *_: Path("stray.onnx").touch())
    with pytest.raises(CheckFailed, match=r"emit.. writes outside of the folder that it is given: stray.onnx"):
        run_check("emission", OnnxRuntime())


def test_a_class_of_which_no_target_can_be_made() -> None:
    @dataclass(frozen=True)
    class Abstract(Backend):
        name: ClassVar[str] = "abstract"

    @dataclass(frozen=True)
    class Demanding(OnnxRuntime):
        level: int = field(kw_only=True)
        """It has no default."""

    with pytest.raises(CheckFailed, match=r"Abstract does not define emit, missing, open"):
        check_backend(Abstract)
    with pytest.raises(CheckFailed, match=r"Demanding\(\) makes no target .*'level'\); give each option a default"):
        check_backend(Demanding)
    for other in (int, 3):
        with pytest.raises(CheckFailed, match=r"int does not derive from planish.optimizer.Backend"):
            check_backend(other)  # type: ignore[arg-type]


def test_a_target_without_a_text_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "__str__", raising)
    with pytest.raises(CheckFailed, match=r"the text form of OnnxRuntime cannot be made: RuntimeError in raising"):
        run_check("names", OnnxRuntime())
    monkeypatch.setattr(OnnxRuntime, "name", None)
    with pytest.raises(CheckFailed, match=r"target OnnxRuntime, check names: OnnxRuntime.name is missing or empty"):
        run_check("names", OnnxRuntime())


def test_a_suffix_of_files_that_it_does_not_write_can_be_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = registry.backend("openvino")
    monkeypatch.setattr(type(openvino), "suffixes", (".xml", ".onnx"))
    assert run_check("suffixes", openvino) is None
    with pytest.raises(CheckFailed, match=r"with the suffix .onnx are opened by target onnxruntime; leave it out"):
        run_check("files", openvino)


def test_another_build_of_a_library_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "libraries", ("annotated",))  # annotated-types is here
    assert run_check("names", OnnxRuntime()) is None
