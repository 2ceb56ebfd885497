"""Tiny random checkpoints of many architectures: odd sizes, real configurations, weights drawn with a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 99


@dataclass(frozen=True)
class Species:
    """One architecture: its configuration class, what differs from the common sizes, and the head to save."""

    model_type: str
    task: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How tests call it."""
        return f"{self.model_type}-{self.task}"


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
"""Head size 8, sizes that are no powers of two, a padding id that is not zero."""

ZOO = [
    Species("bert", "feature-extraction"),
    Species("bert", "fill-mask"),
    Species("bert", "text-classification"),
    Species("bert", "token-classification"),
    Species("bert", "question-answering"),
    Species("bert", "multiple-choice"),
    Species("roberta", "text-classification", {"max_position_embeddings": 50, "type_vocab_size": 1}),
    Species("xlm-roberta", "token-classification", {"max_position_embeddings": 50, "type_vocab_size": 1}),
    Species("camembert", "fill-mask", {"max_position_embeddings": 50, "type_vocab_size": 1}),
    Species("distilbert", "question-answering", {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}),
    Species("electra", "token-classification", {"embedding_size": 16}),
    Species("albert", "text-classification", {"embedding_size": 16}),
    Species("mpnet", "feature-extraction", {"max_position_embeddings": 50}),
    Species("deberta", "text-classification", {"relative_attention": True, "pos_att_type": "c2p|p2c"}),
    Species(
        "deberta-v2",
        "token-classification",
        {"relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0, "position_buckets": 8},
    ),
    Species("modernbert", "fill-mask", {"global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0}),
    Species("roformer", "fill-mask", {"embedding_size": 24}),
    Species("mobilebert", "text-classification", {"embedding_size": 16, "intra_bottleneck_size": 24}),
    Species("squeezebert", "text-classification", {"embedding_size": 24, "q_groups": 1, "k_groups": 1, "v_groups": 1}),
    Species("convbert", "text-classification", {"embedding_size": 24, "conv_kernel_size": 3, "head_ratio": 1}),
    Species("ernie", "text-classification", {"use_task_id": False}),
    Species("rembert", "token-classification", {"input_embedding_size": 16, "output_embedding_size": 20}),
    Species("megatron-bert", "question-answering"),
    Species("layoutlm", "token-classification", {"max_2d_position_embeddings": 64}),
    Species("nystromformer", "text-classification", {"num_landmarks": 48, "segment_means_seq_len": 48}),
    Species("fnet", "text-classification", {"tpu_short_seq_length": 48}),
    Species("xlm", "text-classification", {"emb_dim": 24, "n_layers": 2, "n_heads": 3, "n_words": VOCABULARY}),
    Species("flaubert", "token-classification", {"emb_dim": 24, "n_layers": 2, "n_heads": 3, "n_words": VOCABULARY}),
    Species("ibert", "text-classification", {"max_position_embeddings": 50}),
    Species("data2vec-text", "text-classification", {"max_position_embeddings": 50}),
    Species("roc_bert", "text-classification"),
    Species("splinter", "question-answering"),
    Species("yoso", "text-classification"),
    Species("big_bird", "text-classification", {"attention_type": "original_full"}),
    Species("luke", "text-classification", {"entity_vocab_size": 10}),
    Species("gpt2", "text-classification", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48}),
    Species("llama", "feature-extraction", {"num_key_value_heads": 1}),
    Species("qwen2", "text-classification", {"num_key_value_heads": 1}),
    Species("xmod", "text-classification", {"max_position_embeddings": 50, "default_language": "en_XX"}),
    Species("nomic_bert", "feature-extraction"),
    Species("eurobert", "fill-mask", {"num_key_value_heads": 3, "pad_token_id": 0}),
    Species("esm", "fill-mask", {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 5}),
    Species("lilt", "token-classification", {"max_2d_position_embeddings": 64, "channel_shrink_ratio": 2}),
    Species("markuplm", "token-classification"),
    Species("mra", "text-classification"),
]


_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TRANSLATOR = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


_HEARD = {
    **_TRANSLATOR, "num_mel_bins": 10, "max_source_positions": 13, "max_target_positions": 48, "bos_token_id": 2,
    "eos_token_id": 2, "pad_token_id": 2, "init_std": 0.3,
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"), ...),
}  # fmt: skip


def _writer(model_type: str, **config: Any) -> Species:
    return Species(model_type, "text-generation", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **config})


GENERATORS = [
    _writer("gpt2", n_embd=24, n_layer=2, n_head=3, n_positions=48),
    _writer("gpt_neo", num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]], window_size=8),
    _writer("gpt_neox", rotary_pct=0.5),
    _writer("gptj", n_embd=24, n_layer=2, n_head=3, n_positions=48, rotary_dim=4),
    _writer("opt", ffn_dim=40, word_embed_proj_dim=24, pad_token_id=1, bos_token_id=3),
    _writer("bloom", n_layer=2, n_head=3),
    _writer("falcon", multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False),
    _writer("llama", **_GROUPED, head_dim=8),
    _writer("mistral", **_GROUPED, sliding_window=8),
    _writer("mixtral", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    _writer("qwen2", **_GROUPED, tie_word_embeddings=True),
    _writer("qwen3", **_GROUPED, head_dim=10),
    _writer("phi", partial_rotary_factor=0.5),
    _writer("phi3", num_key_value_heads=3, sliding_window=None),
    _writer("gemma", num_key_value_heads=1, head_dim=10),
    _writer("gemma2", **_GROUPED, head_dim=10, sliding_window=8, query_pre_attn_scalar=10),
    _writer("stablelm", num_key_value_heads=3, partial_rotary_factor=0.25),
    _writer("olmo2", num_key_value_heads=3),
    _writer("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=48, expansion_ratio=2, max_position_embeddings=...),
    _writer("xglm", d_model=24, num_layers=2, attention_heads=3, ffn_dim=40, pad_token_id=1, bos_token_id=0),
    Species("t5", "text2text-generation", _T5),
    Species("mt5", "text2text-generation", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    *(Species(kind, "text2text-generation", _TRANSLATOR) for kind in ("bart", "mbart", "marian", "pegasus", "m2m_100")),
    Species("whisper", "automatic-speech-recognition", _HEARD),
]
"""Decoders and encoder-decoders: grouped and shared heads, windows, experts, tied and untied, odd head sizes."""


_TEXT = dict.fromkeys(("vocab_size", "type_vocab_size", "max_position_embeddings", "pad_token_id"), ...)
_PATCHES = {**_TEXT, "image_size": 30, "patch_size": 6}
_OBLONG = {**_PATCHES, "image_size": [30, 24]}
_RELATIVE = {**_PATCHES, "use_relative_position_bias": True}
_STAGED = {
    **_TEXT, **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), ...), "image_size": 40,
}  # fmt: skip
_WINDOWS = {**_STAGED, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 3], "window_size": 3}
_MAPS = {**_STAGED, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
_PYRAMID = {**_MAPS, "image_size": 64, "num_attention_heads": [1, 2, 2, 4]}


def _classifier(model_type: str, sizes: Mapping[str, Any], **config: Any) -> Species:
    return Species(model_type, "image-classification", {**sizes, **config})


IMAGES = [
    _classifier("vit", _OBLONG),
    Species("vit", "feature-extraction", _OBLONG),
    _classifier("deit", _OBLONG, num_channels=1),
    _classifier("beit", _RELATIVE),
    Species("data2vec-vision", "feature-extraction", _RELATIVE),
    _classifier("dinov2", _PATCHES),
    Species("ijepa", "feature-extraction", _PATCHES),
    _classifier("vit_msn", _PATCHES),
    Species("clip_vision_model", "feature-extraction", _PATCHES),
    Species("siglip_vision_model", "feature-extraction", _PATCHES),
    _classifier("swin", _WINDOWS),
    Species("swinv2", "feature-extraction", _WINDOWS),
    _classifier("convnext", _MAPS),
    Species("convnext", "feature-extraction", _MAPS),
    _classifier("convnextv2", _MAPS),
    _classifier("resnet", _STAGED, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic"),
    _classifier("regnet", _MAPS, embedding_size=8, groups_width=4),
    _classifier("mobilenet_v2", _STAGED, depth_multiplier=0.25),
    _classifier("mobilevit", _STAGED, image_size=64, hidden_sizes=[12, 16, 20], num_attention_heads=2,
                neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 20]),
    _classifier("poolformer", _MAPS, image_size=64),
    _classifier("segformer", _PYRAMID, decoder_hidden_size=16),
    _classifier("pvt", _PYRAMID),
    _classifier("levit", _STAGED, image_size=64, hidden_sizes=[8, 12, 16], num_attention_heads=[2, 3, 4],
                depths=[1, 1, 1], key_dim=[4, 4, 4]),
    _classifier("cvt", _STAGED, image_size=64, embed_dim=[8, 12, 16], depth=[1, 2, 3], num_heads=[1, 2, 2]),
]  # fmt: skip
"""Encoders of images: patches, windows, convolutions; images that are oblong, grey, larger than a window."""


def sizes(species: Species) -> dict[str, Any]:
    """The settings of a species: a span has two labels, other heads have three."""
    wanted = {**COMMON, "num_labels": 2 if species.task == "question-answering" else 3, **species.config}
    return {name: value for name, value in wanted.items() if value is not ...}


def build(species: Species, folder: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the checkpoint of a species into ``folder`` and return it."""
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    from planish.optimizer.lowering.components.tasks import TASKS

    config = AutoConfig.for_model(species.model_type, **sizes(species))
    config.architectures = []  # where a head has several classes, the first is made
    torch.manual_seed(seed)
    auto = TasksManager.get_model_class_for_task(species.task, model_class_name=TASKS[species.task].auto)
    model = auto.from_config(config).eval().to(getattr(torch, dtype))
    with torch.no_grad():  # fresh biases and norms are constants: draw them, so that a lost one is noticed
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not any(part in name for part in ("embed", "wte", "shared")):
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder
