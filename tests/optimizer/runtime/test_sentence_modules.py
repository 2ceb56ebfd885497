"""sentence-transformers folders: every module that modules.json names is computed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from planish.optimizer import optimize
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.inference.answer_options import AnswerOptions
from planish.optimizer.inference.requests import TextRequest
from planish.optimizer.inference.session import open_task, with_options
from planish.optimizer.inference.text_tasks import TextTasks
from planish.optimizer.lowering.checkpoint.checkpoint import companions_in, open_checkpoint
from planish.optimizer.runtime.sentence_modules import SentenceModules, read_modules
from tests.clocks import all_equal
from tests.conftest import with_tokenizer
from tests.zoo import Species, build

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
HIDDEN = torch.randn((1, 5, 6), generator=torch.Generator().manual_seed(0))


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """What a mode makes of the states (tokens, size) of one text without padding."""
    places = torch.arange(1, len(states) + 1)[:, None]
    found: dict[str, torch.Tensor] = {
        "cls": states[0],
        "max": states.max(0).values,
        "mean": states.mean(0),
        "mean_sqrt_len_tokens": states.sum(0) / len(states) ** 0.5,
        "weightedmean": (states * places).sum(0) / places.sum(),
        "lasttoken": states[-1],
    }
    return found[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left", [False, True])
def test_each_pooling_ignores_padding_on_either_side(mode: str, left: bool) -> None:
    padding = np.full((1, 3, 6), 7.0, np.float32)
    states, ones, zeros = HIDDEN.numpy(), np.ones((1, 5), np.int64), np.zeros((1, 3), np.int64)
    parts = ([padding, states], [zeros, ones]) if left else ([states, padding], [ones, zeros])
    hidden, mask = (np.concatenate(part, axis=1) for part in parts)
    found = SentenceModules((mode,)).embed(hidden, mask)
    np.testing.assert_allclose(found[0], pooled(HIDDEN[0], mode).numpy(), rtol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("left", [False, True])
def test_a_prompt_is_left_out_of_the_pooling(left: bool) -> None:
    hidden = np.concatenate([HIDDEN.numpy(), np.full((1, 2, 6), 7.0, np.float32)], axis=1)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]])
    if left:
        hidden, mask = np.roll(hidden, 2, axis=1), np.roll(mask, 2, axis=1)
    behind = HIDDEN[0, 2:]
    for mode in ("max", "mean", "mean_sqrt_len_tokens", "lasttoken"):
        found = SentenceModules((mode,), include_prompt=False).embed(hidden, mask, 2)
        np.testing.assert_allclose(found[0], pooled(behind, mode).numpy(), rtol=1e-5)
    weights = torch.arange(3, 6)[:, None]  # places are counted from the beginning of the prompt
    found = SentenceModules(("weightedmean",), include_prompt=False).embed(hidden, mask, 2)
    np.testing.assert_allclose(found[0], ((behind * weights).sum(0) / weights.sum()).numpy(), rtol=1e-5)


Write = Callable[..., Path]
"""Pooling options, kinds of modules, their configurations -> a folder as `SentenceTransformer.save` writes it."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(pooling: dict[str, Any], *modules: tuple[str, dict[str, Any]], **options: Any) -> Path:
        chain = [("Transformer", {}), ("Pooling", {"word_embedding_dimension": 6, **pooling}), *modules]
        listed = []
        for index, (kind, config) in enumerate(chain):
            path = "" if kind == "Transformer" else f"{index}_{kind}"
            listed.append(
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            )
            (tmp_path / path).mkdir(exist_ok=True)
            if kind not in ("Transformer", "Normalize"):
                (tmp_path / path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps(options))
        return tmp_path

    return make


def test_several_modes_are_joined_in_their_order(write: Write) -> None:
    folder = write({f"pooling_mode_{flag}": True for flag in reversed(FLAGS)})
    expected = torch.cat([pooled(HIDDEN[0], mode) for mode in MODES]).numpy()
    np.testing.assert_allclose(read_modules(folder).embed(HIDDEN.numpy(), np.ones((1, 5)))[0], expected, rtol=1e-5)
    folder = write({"pooling_mode": ["lasttoken", "mean"]})  # as version 5 writes it: in the order that is named
    expected = torch.cat([pooled(HIDDEN[0], mode) for mode in ("lasttoken", "mean")]).numpy()
    np.testing.assert_allclose(read_modules(folder).embed(HIDDEN.numpy(), np.ones((1, 5)))[0], expected, rtol=1e-5)


@pytest.mark.parametrize("activation", ["Tanh", "GELU", "ReLU", "SiLU", "Sigmoid", "Identity"])
@pytest.mark.parametrize(
    ("size", "residual", "dtype"), [(4, False, torch.float32), (4, True, torch.bfloat16), (6, True, torch.float16)]
)
def test_dense_then_norms(activation: str, size: int, residual: bool, dtype: torch.dtype, write: Write) -> None:
    library = "linear" if activation == "Identity" else "activation"
    config = {"in_features": 6, "out_features": size, "use_residual": residual,
              "activation_function": f"torch.nn.modules.{library}.{activation}"}  # fmt: skip
    folder = write(
        {}, ("Dropout", {"dropout": 0.5}), ("Dense", config), ("LayerNorm", {"dimension": size}), ("Normalize", {})
    )
    torch.manual_seed(1)
    linear, other = torch.nn.Linear(6, size).to(dtype), torch.nn.Linear(6, size, bias=False).to(dtype)
    norm = torch.nn.LayerNorm(size)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    save_file(
        {"linear.weight": linear.weight, "linear.bias": linear.bias, "residual.weight": other.weight},
        folder / "3_Dense" / "model.safetensors",
    )
    save_file(
        {f"norm.{name}": tensor for name, tensor in norm.state_dict().items()},
        folder / "4_LayerNorm" / "model.safetensors",
    )
    with torch.no_grad():
        vector = HIDDEN[0].mean(0)
        mapped = getattr(torch.nn, activation)()(linear.float()(vector))
        mapped = mapped + ((vector if size == 6 else other.float()(vector)) if residual else 0)
        expected = torch.nn.functional.normalize(norm(mapped), dim=0)
    found = read_modules(folder).embed(HIDDEN.numpy(), np.ones((1, 5)))
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)


DENSE = {"in_features": 6, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}


@pytest.mark.parametrize(
    ("pooling", "modules", "message"),
    [
        ({"pooling_mode": "attention"}, [], "the pooling 'attention' is not supported"),
        ({}, [("CNN", {})], r"the module 'sentence_transformers\.models\.CNN' is not supported"),
        ({}, [("WordWeights", {})], "WordWeights' is not supported"),
        ({}, [("Pooling", {})], "Transformer > Pooling > Pooling are not supported"),
        ({}, [("Dense", DENSE | {"activation_function": "mine.Act"})], "the activation 'mine.Act' is not supported"),
        ({}, [("Dense", DENSE | {"module_input_name": "token_embeddings"})], "a Dense module from 'token_embeddings'"),
        ({}, [("Dense", DENSE)], "there is no model.safetensors"),
        ({}, [("Dense", {})], "in_features: Field required"),
        ({"pooling_mode_cls_token": "yes"}, [], "pooling_mode_cls_token: Input should be a valid boolean"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_named(pooling: dict[str, Any], modules: list[Any], message: str, write: Write) -> None:
    folder = write(pooling, *modules)
    with pytest.raises(BadInput, match=message):
        read_modules(folder)


def test_weights_of_dense_must_fit_and_be_no_pickle(write: Write) -> None:
    folder = write({}, ("Dense", DENSE))
    save_file({"linear.weight": torch.zeros(4, 5)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(BadInput, match=r"'linear.bias' is not there"):
        read_modules(folder)
    save_file(
        {"linear.weight": torch.zeros(4, 5), "linear.bias": torch.zeros(4)}, folder / "2_Dense" / "model.safetensors"
    )
    with pytest.raises(BadInput, match=r"'linear.weight' has shape \[4, 5\], config.json describes \[4, 6\]"):
        read_modules(folder)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(BadInput, match="only a pickle"):
        read_modules(folder)


@pytest.mark.parametrize("path", ["../other", "/etc", "1_Pooling/../../other", "a\0b"])
def test_modules_outside_of_the_folder_are_refused(path: str, write: Write) -> None:
    folder = write({})
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(BadInput, match="leads outside of this folder"):
        read_modules(folder)
    assert companions_in(folder) == []


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint with Dense, LayerNorm, two poolings and prompts, and the output that was built of it."""
    folder = with_tokenizer(
        build(Species("bert", "feature-extraction"), tmp_path_factory.mktemp("sentences") / "checkpoint")
    )
    size = int(json.loads((folder / "config.json").read_text())["hidden_size"])
    modes = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True, "include_prompt": False}
    modules = {"1_Pooling": {"word_embedding_dimension": size, **modes},
               "2_Dense": DENSE | {"in_features": 2 * size, "out_features": 5}, "3_Normalize": None}  # fmt: skip
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for name, config in modules.items():
        (folder / name).mkdir()
        listed.append({"path": name, "type": f"sentence_transformers.models.{name[2:]}"})
        if config is not None:
            (folder / name / "config.json").write_text(json.dumps(config))
    torch.manual_seed(2)
    save_file(
        {"linear.weight": torch.randn(5, 2 * size), "linear.bias": torch.randn(5)},
        folder / "2_Dense" / "model.safetensors",
    )
    for name, value in (
        ("modules.json", listed),
        ("sentence_bert_config.json", {"max_seq_length": 8, "do_lower_case": True}),
        ("config_sentence_transformers.json", {"prompts": {"query": "w1 w2: ", "plain": ""}, "default_prompt_name": None}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    optimize(folder, folder.parent / "out", clock=all_equal)
    return folder, folder.parent / "out"


def expected_embedding(folder: Path, text: str, prompt_tokens: int = 0) -> np.ndarray:
    """By PyTorch, from the files of the checkpoint."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=8)
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder).eval()(**encoded).last_hidden_state[0][prompt_tokens:]
    both = torch.cat([states.mean(0), states[-1]])
    return np.asarray(
        torch.nn.functional.normalize(torch.tanh(dense["linear.weight"] @ both + dense["linear.bias"]), dim=0)
    )


@pytest.mark.slow
def test_an_output_embeds_as_its_checkpoint_does(sentences: tuple[Path, Path]) -> None:
    folder, out = sentences
    task = open_task(out)
    assert isinstance(task, TextTasks)
    short, long = task.answer([TextRequest("w5 W6 w7"), TextRequest(" ".join(["w3"] * 20))])
    np.testing.assert_allclose(short["embedding"], expected_embedding(folder, "w5 w6 w7"), atol=1e-5)
    np.testing.assert_allclose(long["embedding"], expected_embedding(folder, " ".join(["w3"] * 20)), atol=1e-5)
    assert (long.get("truncated"), short.get("truncated")) == (True, None)
    (asked,) = with_options(task, AnswerOptions(prompt="query")).answer([TextRequest("w5 w6")])
    np.testing.assert_allclose(asked["embedding"], expected_embedding(folder, "w1 w2: w5 w6", 4), atol=1e-5)
    with pytest.raises(UsageError, match="no prompt 'document'; there are: query, plain"):
        with_options(task, AnswerOptions(prompt="document"))


def test_the_modules_travel_with_the_engine(sentences: tuple[Path, Path]) -> None:
    folder, out = sentences
    for name in companions_in(folder):
        assert (out / "onnxruntime" / name).read_bytes() == (folder / name).read_bytes()
    assert Path("2_Dense/model.safetensors") in companions_in(folder)
    assert Path("config_sentence_transformers.json") in companions_in(folder)


def test_a_module_that_is_not_supported_is_refused_before_the_build(
    sentences: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(sentences[0], tmp_path / "checkpoint"))
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("models.Dense", "models.LSTM"))
    with pytest.raises(BadInput, match=r"the module 'sentence_transformers\.models\.LSTM' is not supported"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, "fill-mask").task == "fill-mask"
