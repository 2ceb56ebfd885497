"""The class that config.json names decides the head: its outputs are PyTorch's, and none of them is lost in silence."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.inference.postprocessing import projected
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering import Lowered, lower

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TEXTS = {**SIZES, "vocab_size": 99, "max_position_embeddings": 48, "pad_token_id": 1}
T5 = {"vocab_size": 99, "d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_heads": 3, "pad_token_id": 0}
CLIP = {**SIZES, "projection_dim": 10}
ENDS = {"eos_token_id": 98, "bos_token_id": 97}


def _config(kind: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, kind)(**settings)

    return make


CONFIGS = {
    "BertModel": _config("BertConfig", **TEXTS),
    "BertForPreTraining": _config("BertConfig", **TEXTS),
    "BertForNextSentencePrediction": _config("BertConfig", **TEXTS),
    "DPRContextEncoder": _config("DPRConfig", **TEXTS, projection_dim=10),
    "DPRQuestionEncoder": _config("DPRConfig", **TEXTS, projection_dim=10),
    "DPRReader": _config("DPRConfig", **TEXTS),
    "CLIPTextModelWithProjection": _config("CLIPTextConfig", **{**TEXTS, **CLIP, **ENDS}),
    "CLIPVisionModelWithProjection": _config("CLIPVisionConfig", **CLIP, image_size=30, patch_size=6),
    "CLIPModel": _config("CLIPConfig", text_config={**TEXTS, **ENDS}, vision_config=CLIP),
    "SiglipTextModel": _config("SiglipTextConfig", **TEXTS),
    "LongformerModel": _config("LongformerConfig", **TEXTS, attention_window=8),
    "CanineModel": _config("CanineConfig", **SIZES, downsampling_rate=4, num_hash_buckets=50),
    "T5EncoderModel": _config("T5Config", **T5),
    "MT5EncoderModel": _config("MT5Config", **T5),
    "UMT5EncoderModel": _config("UMT5Config", **T5),
    "T5Model": _config("T5Config", **T5),
    "GPT2DoubleHeadsModel": _config("GPT2Config", n_embd=24, n_layer=2, n_head=3, vocab_size=99),
}


def saved(name: str, folder: Path) -> Any:
    """The model, whose checkpoint names this class and lies in ``folder``."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]()).eval()
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return model


def outputs_equal(model: Any, lowered: Lowered, folder: Path) -> list[str]:
    """Names of the outputs of the engine, each of which is PyTorch's on texts of several lengths, one batch padded."""
    import torch

    backend = registry.backend("onnxruntime")
    folder.mkdir()
    backend.emit(lowered.program, folder)
    engine = backend.open(folder)
    signature = lowered.program.sole()[1]
    for case in make_inputs(signature)[:2]:
        if "input_ids" in case and getattr(model.config, "eos_token_id", None) == ENDS["eos_token_id"]:
            case["input_ids"][:, -1] = ENDS["eos_token_id"]  # CLIP pools there
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(array) for name, array in case.items()})
        found = engine.run(case)
        for name in found:
            np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    return [tensor.name for tensor in signature.outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "outputs"),
    [
        ("BertForNextSentencePrediction", "text-classification", ["logits"]),
        ("DPRContextEncoder", "feature-extraction", ["pooler_output"]),
        *(
            pytest.param(*row, marks=pytest.mark.breadth)
            for row in (
                ("DPRQuestionEncoder", "feature-extraction", ["pooler_output"]),
                ("DPRReader", "question-answering", ["start_logits", "end_logits", "relevance_logits"]),
                ("CLIPTextModelWithProjection", "feature-extraction", ["last_hidden_state", "text_embeds"]),
                ("CLIPVisionModelWithProjection", "feature-extraction", ["last_hidden_state", "image_embeds"]),
                ("SiglipTextModel", "feature-extraction", ["last_hidden_state", "pooler_output"]),
                ("T5EncoderModel", "feature-extraction", ["last_hidden_state"]),
                ("MT5EncoderModel", "feature-extraction", ["last_hidden_state"]),
                ("UMT5EncoderModel", "feature-extraction", ["last_hidden_state"]),
            )
        ),
    ],
)
def test_the_named_class_is_lowered_with_all_that_it_gives(
    name: str, task: str, outputs: list[str], tmp_path: Path
) -> None:
    model = saved(name, tmp_path / "checkpoint")
    lowered = lower(tmp_path / "checkpoint")
    assert (lowered.program.provenance.architecture, lowered.program.task) == (name, task)
    assert outputs_equal(model, lowered, tmp_path / "engine") == outputs
    assert lowered.program.provenance.notes == ()


@pytest.mark.slow
def test_an_output_that_is_not_taken_is_named(tmp_path: Path) -> None:
    saved("BertModel", tmp_path)
    lowered = lower(tmp_path)
    assert [tensor.name for tensor in lowered.program.sole()[1].outputs] == ["last_hidden_state"]
    assert lowered.program.provenance.notes == ("outputs of BertModel that are not taken: pooler_output",)


@pytest.mark.breadth
def test_another_head_than_the_named_one_is_said(tmp_path: Path) -> None:
    saved("BertForPreTraining", tmp_path)
    notes = lower(tmp_path, "fill-mask").program.provenance.notes
    assert notes == ("config.json names BertForPreTraining; lowered is BertForMaskedLM, which serves fill-mask",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BertForPreTraining", "which gives prediction_logits, seq_relationship_logits, does not tell its task"),
        ("GPT2DoubleHeadsModel", "which gives logits, mc_logits, does not tell its task"),
        ("CLIPModel", "CLIPModel takes texts and images in one call"),
        ("T5Model", "T5Model has a decoder"),
    ],
)
def test_what_is_not_served_is_refused_with_its_outputs(name: str, words: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    with pytest.raises(BadInput, match=words):
        lower(tmp_path)


def test_embeddings_are_those_of_the_class() -> None:
    hidden, vector = np.zeros((2, 3, 4)), np.ones((2, 5))
    assert projected({"last_hidden_state": hidden, "text_embeds": vector}) is vector
    assert projected({"pooler_output": vector}) is vector
    assert projected({"last_hidden_state": hidden, "pooler_output": vector}) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LongformerModel", "a branch depends on computed values"),
        pytest.param("CanineModel", "sequence of input_ids", marks=pytest.mark.breadth),
    ],
)
def test_what_torch_cannot_capture_is_told_in_one_line(name: str, words: str, tmp_path: Path) -> None:
    """torch prints the graph that it got to: pages of it."""
    saved(name, tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(BadInput, match=words) as refused:
        lower(tmp_path)
    assert f"torch cannot capture {name}" in str(refused.value)
    assert len(str(refused.value)) < 600
    assert len(said.getvalue().splitlines()) < 3, said.getvalue()
