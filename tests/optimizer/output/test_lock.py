"""Locks that people have edited: each fault is one clear line with the lock, before anything is lowered where possible."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.output.lock import Lock, Product, Selection, Speed
from tests.optimizer.cli.test_bad_input import BAD_INPUT, USAGE, refused

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[rows,4] x) => (float[rows,4] y) { i = Identity (x)  y = Relu (i) }"""
PIPELINE = "eliminate-identities"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and the lock that a build has written."""
    folder = tmp_path_factory.mktemp("locked")
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    (folder / "tokenizer_config.json").write_text("{}")
    optimize(folder / "model.onnx", folder / "out", pipeline=PIPELINE, reference="none", lock=folder / "m.lock")
    shutil.rmtree(folder / "out")
    return folder


@pytest.fixture
def place(locked: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(locked, tmp_path / "copy"))


@pytest.fixture
def _nothing_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: object, **__: object) -> None:
        raise AssertionError("nothing shall be lowered")

    monkeypatch.setattr("planish.optimizer.driver.optimize.lower", lower)


def edit(place: Path, old: str, new: str) -> None:
    text = (place / "m.lock").read_text()
    assert old in text, text
    (place / "m.lock").write_text(text.replace(old, new))


def refused_in(place: Path, code: int, *messages: str) -> None:
    """A build from the lock is refused with one line, and leaves no file."""
    before = sorted(place.iterdir())
    arguments = ["--pipeline", PIPELINE, "--reference", "none", "--lock", place / "m.lock"]
    for message in messages:
        refused(code, message, "optimize", place / "model.onnx", "-o", place / "out", *arguments)
    assert sorted(place.iterdir()) == before


MEASURED = "measured = [{ shape = 'batch 1', speedup = 1.1, low = %s, high = 1.2 }]"
EDITED: dict[str, tuple[str, str, str]] = {
    "no pipelines": (f'\nmodel = "{PIPELINE}"', "", "m.lock, targets.onnxruntime.pipelines: there is no pipeline here"),
    "a table of another name": ("[targets.onnxruntime", "[targets.foo", "targets.foo is a selection for 'onnxruntime'"),
    "a long integer": ("format = 1", f"format = {'1' * 5000}", "this holds an integer that is too long"),
    "deep nesting": ("format = 1", f"format = {'[' * 5000}", "this is nested deeper than 64 levels"),
    "deep keys": ("format = 1", f"{'.'.join('a' * 100)} = 1", "this is nested deeper than 64 levels"),
    "no TOML": ("format = 1", "format", "this is not TOML"),
    "a truth as format": ("format = 1", "format = true", "format: Input should be a valid integer"),
    "a later format": ("format = 1", "format = 2", "format: Input should be less than or equal to 1"),
    "an unknown name": ("format = 1", "formt = 1", "formt: Extra inputs are not permitted"),
    "not a number": ("measured = []", MEASURED % "nan", "measured.0.low: Input should be a finite number"),
    "infinity": ("measured = []", MEASURED % "inf", "measured.0.low: Input should be a finite number"),
    "a negative speed-up": ("measured = []", MEASURED % "-1", "measured.0.low: Input should be greater than or equal"),
    "a text as speed-up": ("measured = []", MEASURED % "'1'", "measured.0.low: Input should be a valid number"),
    "a text as truth": (
        "tried = []",
        "tried = [{ passes = 'a', kept = 'yes', why = 'b' }]",
        "tried.0.kept: Input should be a valid boolean",
    ),
    "no such pass": (f'model = "{PIPELINE}"', 'model = "unfuse-gem{x=1}"', "unknown pass 'unfuse-gem'"),
    "no end of options": (
        f'model = "{PIPELINE}"',
        'model = "prune-ffn{keep=0.5"',
        "m.lock, targets.onnxruntime.pipelines.model: expected an option or '}', found the end at column 19",
    ),
    "an arithmetic of another target": (
        "why = ",
        'opened_as = "openvino"\nwhy = ',
        "m.lock, targets.onnxruntime.opened_as: an engine for onnxruntime cannot be opened as openvino",
    ),
    "no such arithmetic": (
        "why = ",
        'opened_as = "onnxruntime{thread=1}"\nwhy = ',
        "m.lock, targets.onnxruntime.opened_as: unknown option 'thread'",
    ),
}


@pytest.mark.usefixtures("_nothing_lowered")
@pytest.mark.parametrize("name", EDITED)
def test_an_edited_lock_is_refused_before_anything_is_lowered(name: str, place: Path) -> None:
    old, new, message = EDITED[name]
    edit(place, old, new)
    refused_in(place, BAD_INPUT, message, f"{place / 'm.lock'}")


def test_components_are_compared_as_soon_as_they_are_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("nothing shall be run")

    monkeypatch.setattr("planish.optimizer.driver.optimize.ask_original", ask)
    edit(place, "\nmodel = ", "\nmodell = ")
    said = "m.lock, targets.onnxruntime.pipelines: it has pipelines for modell, and the source has model"
    refused_in(place, BAD_INPUT, said)
    edit(place, "\nmodell = ", '\nmodel = ""\nmodell = ')
    refused_in(place, BAD_INPUT, "it has pipelines for model, modell, and the source has model")


@pytest.mark.usefixtures("_nothing_lowered")
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda place: (place / "tokenizer_config.json").write_text("{ }"), "tokenizer_config.json has changed"),
        (lambda place: (place / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    ],
)
def test_the_file_that_differs_is_named(change: Callable[[Path], Any], difference: str, place: Path) -> None:
    change(place)
    refused_in(place, USAGE, f"{place / 'm.lock'}: this lock was made for another source: {difference}")


def test_a_new_file_of_the_source_is_named(place: Path) -> None:
    (place / "config.json").write_text("{}")
    refused_in(place, USAGE, "this lock was made for another source: config.json is not in the lock")


def selection(**changes: Any) -> Selection:
    fields: dict[str, Any] = {
        "pipelines": {"model": ""},
        "rolled_back": [],
        "shipped": "plain",
        "why": "",
        "measured": [],
    }
    return Selection(**({"target": "onnxruntime", "machine": ""} | fields | changes))


def test_what_a_build_writes_can_be_read(tmp_path: Path) -> None:
    """Noise is infinite or no number where float32 overflows, and divergences are rounded."""
    noises = [0.0, math.inf, math.nan]
    products = [
        Product(
            component="model", text="", product="p", location="", noise=noise, effect=-1e-9, weights=8, rounded=False
        )
        for noise in noises
    ]
    speed = Speed(shape="batch 1", speedup=1, low=0.5, high=2.0)
    lock = Lock(source={}, requested={}, targets={"onnxruntime": selection(products=products, measured=[speed])})
    (tmp_path / "m.lock").write_text(lock.text())
    again = Lock.read(tmp_path / "m.lock").targets["onnxruntime"]
    assert again.measured == [speed]
    assert [str(product.noise) for product in again.products] == [str(noise) for noise in noises]


@pytest.mark.parametrize("change", [{"weights": -1}, {"weights": 1 << 50}, {"noise": -0.5}])
def test_products_with_impossible_figures(change: dict[str, Any], tmp_path: Path) -> None:
    product = Product(component="model", text="", product="p", location="", noise=0, weights=8, rounded=False)
    wrong = selection(products=[product.model_copy(update=change)])
    lock = Lock(source={}, requested={}, targets={"onnxruntime": wrong})
    (tmp_path / "m.lock").write_text(lock.text())
    with pytest.raises(BadInput, match=rf"m\.lock: targets\.onnxruntime\.products\.0\.{next(iter(change))}: "):
        Lock.read(tmp_path / "m.lock")


def test_a_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"this lock cannot be read \(No such file"):
        Lock.read(tmp_path / "m.lock")
    (tmp_path / "m.lock").write_bytes(b"format = 1 # \xff")
    with pytest.raises(BadInput, match="this is not TOML"):
        Lock.read(tmp_path / "m.lock")


def test_a_library_call_says_the_same(place: Path) -> None:
    edit(place, f'model = "{PIPELINE}"', 'model = "unfuse-gem"')
    with pytest.raises(BadInput, match=r"targets\.onnxruntime\.pipelines\.model: unknown pass"):
        optimize(place / "model.onnx", place / "out", pipeline=PIPELINE, reference="none", lock=place / "m.lock")
    with pytest.raises(UsageError, match="this lock was made for"):
        optimize(place / "model.onnx", place / "out", pipeline="fuse-gelu", reference="none", lock=place / "m.lock")
