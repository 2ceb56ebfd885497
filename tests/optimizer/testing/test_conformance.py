"""Each check of a backend finds the fault that it is for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from planish.backends.onnxruntime.target import OnnxRuntime
from planish.optimizer.errors import CheckFailed, UsageError
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.interfaces.recipe import Recipe
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


counter = itertools.count()
FAULTS: dict[str, Fault] = {
    "no distribution": ("names", lambda m: m.setattr(OnnxRuntime, "distribution", ""), "distribution is missing"),
    "another name": ("names", lambda m: m.setattr(OnnxRuntime, "name", "other"), "no entry point of the group"),
    "no point": ("names", lambda m: m.setattr(OnnxRuntime, "suffixes", ("onnx",)), "suffixes begin with a point"),
    "text form": ("options", lambda m: m.setattr(OnnxRuntime, "__str__", lambda _: "x{threads=7}"), "equal target"),
    "unknown preset": ("presets", lambda m: presets(m, quick=(Recipe(("fuse-gelu",), why="y"),)), "no preset 'quick'"),
    "no main recipe": ("presets", lambda m: presets(m, fast=()), "0 recipes that are always tried"),
    "no reason": ("presets", lambda m: presets(m, fast=(Recipe(("fuse-gelu",)),)), "does not say why fuse-gelu"),
    "unknown pass": ("presets", lambda m: presets(m, fast=(Recipe(("fuse-glu",), why="y"),)), "unknown pass 'fuse-glu'"),
    "not exact": ("presets", lambda m: presets(m, exact=(Recipe(("quantize-int8",), why="y"),)), "quantize-int8"),
    "nothing missing": ("missing-runtime", lambda m: m.setattr(OnnxRuntime, "missing", staticmethod(lambda: None)), "nothing is miss"),
    "no advice": ("missing-runtime", lambda m: m.setattr(OnnxRuntime, "missing", staticmethod(lambda: "no")), "how to install: no"),
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


def test_a_bug_of_the_backend_is_told_with_the_check_that_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(self: Backend, program: Program, folder: Path) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(OnnxRuntime, "emit", emit)
    with pytest.raises(ZeroDivisionError) as caught:
        run_check("emission", OnnxRuntime())
    assert caught.value.__notes__ == ["in the check emission of target onnxruntime"]
