"""`load`: whatever Planish wrote answers in Python as `planish run` does, and shows itself harmlessly."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import re
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import planish.optimizer
from planish.optimizer import LoadedModel, load, optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.requests import TextRequest
from planish.optimizer.inference.session import open_task
from planish.optimizer.inference.text_tasks import TextTasks
from planish.optimizer.runtime.tokenization import LightTokenizer
from tests.clocks import all_equal
from tests.conftest import with_tokenizer
from tests.zoo import GENERATORS, IMAGES, Species, build

pytestmark = pytest.mark.slow
VIT = next(species for species in IMAGES if species.model_type == "vit" and species.task == "image-classification")
KINDS = {
    "labels": Species("bert", "text-classification"),
    "vectors": Species("bert", "feature-extraction"),
    "spans": Species("bert", "question-answering"),
    "choices": Species("bert", "multiple-choice"),
    "writer": Species("gpt2", "text-generation"),
    "translator": next(species for species in GENERATORS if species.model_type == "t5"),
    "images": VIT,
}
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("loading")

    def make(kind: str) -> Path:
        if not (folder / kind).is_dir():
            optimize(with_tokenizer(build(KINDS[kind], folder / f"{kind}-checkpoint")), folder / kind, clock=all_equal)
        return folder / kind

    return make


def test_texts_are_answered_as_run_answers_them(built: Built) -> None:
    out = built("labels")
    model = load(out)
    (expected,) = open_task(out).answer([TextRequest("w1 w2")])
    assert model("w1 w2") == expected
    assert [answer["label"] for answer in model(["w1 w2", "w3"])] == [expected["label"], model("w3")["label"]]
    assert sum(model("w1", logits=True)["scores"].values()) != pytest.approx(1.0)
    assert model("w1", "w2") == open_task(out).answer([TextRequest("w1", "w2")])[0]
    assert model.task == "text-classification"
    ids = np.array([[2, 5, 3]])
    np.testing.assert_array_equal(model({"input_ids": ids})["logits"], model.engine.run({"input_ids": ids})["logits"])
    assert list(model.engines) == ["onnxruntime"]
    assert load(str(out / "onnxruntime"))("w1 w2") == expected


@pytest.mark.parametrize("light", [True, False])
def test_threads_share_a_model(light: bool, built: Built, tmp_path: Path) -> None:
    """A tokenizer keeps what each call sets: another thread's call would be cut or padded by it."""
    folder = built("labels") / "onnxruntime"
    if not light:  # without a manifest nothing is known of the tokenizer: transformers' is taken
        folder = Path(shutil.copytree(folder, tmp_path / "engine"))
    model = load(folder)
    assert isinstance(model._task, TextTasks)
    assert isinstance(model._task.tokenizer, LightTokenizer) == light
    asked = ["w1", " ".join(["w2"] * 400), ["w3", "w4 w5"], [" ".join(["w6"] * 300), "w7"]] * 25
    expected = [model(texts) for texts in asked[:4]]
    assert [expected[1].get("truncated"), expected[3][0].get("truncated")] == [True, True]
    with ThreadPoolExecutor(4) as pool:
        for index, answers in enumerate(pool.map(model, asked)):
            assert answers == expected[index % 4]


def test_engines_stay_open_until_the_model_is_closed(built: Built) -> None:
    model = load(built("labels"))
    engines = model.engines
    assert model.engines is engines
    kept = weakref.ref(engines["onnxruntime"])
    del engines
    model.close()
    gc.collect()
    assert kept() is None
    with pytest.raises(UsageError, match="this model is closed; load it again"):
        model.engines  # noqa: B018


def test_embeddings_are_arrays(built: Built) -> None:
    model = load(built("vectors"))
    several = model(["w1 w2", "w3"])
    assert (several.dtype, several.ndim, len(several)) == (np.float32, 2, 2)
    np.testing.assert_allclose(model("w1 w2"), several[0], atol=1e-5)


def test_pairs_and_choices(built: Built) -> None:
    spans = load(built("spans"))
    assert spans("w1", "w2 w3")["answer"] in "w2 w3"
    assert len(spans(["w1", "w2"], ["w3 w4", "w5"])) == 2
    choices = load(built("choices"))
    assert choices("w1", choices=["w2", "w3 w4"])["text"] in ("w2", "w3 w4")
    assert len(choices(["w1", "w2"], choices=[["w2", "w3"], ["w4", "w5"]])) == 2
    with pytest.raises(UsageError, match="2 texts, 1 second texts"):
        spans(["w1", "w2"], ["w3"])
    with pytest.raises(UsageError, match="choices are what a multiple choice"):
        choices("w1")


def test_engines_that_write(built: Built) -> None:
    with load(built("writer")) as model:
        text = model("w1 w2", max_new_tokens=5)
        assert isinstance(text, str)
        assert model(["w1 w2"], max_new_tokens=5) == [text]
        assert model("w1", temperature=0.9, top_k=5, seed=3) == model("w1", temperature=0.9, top_k=5, seed=3)
        prompt = {"input_ids": np.array([[5, 6]]), "attention_mask": np.ones((1, 2), np.int64)}
        steps = [int(step[0]) for step in model.decoding().generate(prompt, most=3)]
        assert steps == [int(step[0]) for step in model.decoding("onnxruntime").generate(prompt, most=3)]
        with pytest.raises(UsageError, match="temperature: Input should be greater than or equal to 0"):
            model("w1", temperature=-1)
        with pytest.raises(UsageError, match="max_new_tokens: "):
            model("w1", max_new_tokens=0)
    with pytest.raises(UsageError, match="this model is closed; load it again"):
        model("w1")
    assert "closed" in repr(model)


def test_an_encoder_decoder(built: Built) -> None:
    model = load(built("translator"))
    assert isinstance(model("w1 w2", max_new_tokens=3), str)
    with pytest.raises(UsageError, match="several components"):
        model.engine  # noqa: B018
    with pytest.raises(UsageError, match=r"several components; use model.decoding\(\)"):
        model.engines  # noqa: B018
    with pytest.raises(UsageError, match="there is no engine 'openvino'; there are: onnxruntime"):
        model.decoding("openvino")


def test_images(built: Built) -> None:
    model = load(built("images"))
    answers = model({"pixel_values": np.zeros((2, 3, 30, 24), np.float32)})
    assert [set(answer) for answer in answers] == [{"label", "score", "scores"}] * 2
    with pytest.raises(UsageError, match="this engine takes pixel_values, not texts"):
        model("a cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 3}, "does not go on with a text"),
        ({"temperature": 1.0}, "does not go on with a text"),
        ({"prompt": "query"}, "only texts that are embedded"),
        ({"choices": ["w1"]}, "choices are what a multiple choice"),
    ],
)
def test_what_does_not_apply_is_refused(options: dict[str, object], message: str, built: Built) -> None:
    with pytest.raises(UsageError, match=message):
        load(built("labels"))("w1", **options)  # type: ignore[arg-type]


def test_other_folders_and_other_values_are_refused(built: Built, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        load(tmp_path)
    with pytest.raises(BadInput, match="there is no engine for 'openvino' here"):
        load(built("labels"), target="openvino")
    with pytest.raises(UsageError, match="this is no text but a int"):
        load(built("labels"))([3])  # type: ignore[list-item]


def test_it_shows_itself(built: Built, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built("labels"), tmp_path / ("<b>&" + "x" * 100)))
    manifest = json.loads((out / "planish.json").read_text())
    manifest["source"]["architecture"] = "<script>alert(1)</script>\x1b[31m"
    (out / "planish.json").write_text(json.dumps(manifest))
    model = load(out)
    assert isinstance(model, LoadedModel)
    assert len(repr(model)) <= 80
    assert repr(model).startswith("<planish model: text-classification, onnxruntime, ")
    page = model._repr_html_()
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "tr", "th", "td"}
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "input_ids INT64[batch, sequence]" in page


def test_the_version_is_that_of_the_distribution() -> None:
    assert planish.optimizer.__version__ == importlib.metadata.version("planish")
