"""What every exporter makes of every kind of block, and how much of it is raised: `python -m tests.exporters`.

`export` writes the graphs of tiny models, by several exporters and opsets, into `tests/data/exports.zip`; they are
kept, so that the tests need not export, and a new version of an exporter shows what it changed. `table` writes
`docs/fusion.md` from them.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from planish.optimizer import Pipeline
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.components.calls import CALLS
from planish.optimizer.lowering.export.torch_export import wrap
from planish.optimizer.pipeline import presets

ARCHIVE = Path(__file__).parent / "data" / "exports.zip"
PAGE = Path(__file__).parents[1] / "docs" / "fusion.md"
LAYERS = 2
RAISED = ("Attention", "LayerNormalization", "RMSNormalization", "Gelu", "RotaryEmbedding")


_PARTS = {
    "encode": "",
    "decoder": "-with-past",
    "first_decoder": "-decoder",
    "next_decoder": "-decoder-with-past",
}


@dataclass(frozen=True)
class Block:
    """A kind of block: its configuration, and how many of each operator a model of it should become."""

    model_type: str
    expected: Mapping[str, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    """Why something is left as it is."""
    spelled: bool = False
    """Whether the architecture only knows attention spelled out."""
    unknown: tuple[str, ...] = ()
    """Exporters that refuse it."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """What stays as it is of exports by way of TorchScript, which tell fewer shapes."""
    call: Literal["encode", "decoder", "first_decoder", "next_decoder"] = "encode"
    """How it is called: tokens and a mask in, hidden states out, or as lowering calls what has a cache."""

    @property
    def name(self) -> str:
        """How tests and the table call it."""
        return self.model_type + _PARTS[self.call]

    def expected_of(self, name: str) -> dict[str, int]:
        """How many of each operator a kept file should give."""
        return {**self.expected, **(self.lost if " torchscript " in name else {})}


@dataclass(frozen=True)
class Exporter:
    """A way to write ONNX: PyTorch's exporter of old (TorchScript) or of today, an opset, how attention is computed."""

    way: str
    opset: int
    attention: str

    def __str__(self) -> str:
        return f"{self.way} {self.opset} {self.attention}"


EXPORTERS = [
    Exporter("torchscript", 14, "sdpa"),
    Exporter("torchscript", 14, "eager"),
    Exporter("torchscript", 17, "eager"),
    Exporter("torchscript", 18, "sdpa"),
    Exporter("torchscript", 20, "eager"),
    Exporter("dynamo", 18, "sdpa"),
    Exporter("dynamo", 18, "eager"),
    Exporter("dynamo", 20, "sdpa"),
    Exporter("dynamo", 21, "eager"),
    Exporter("dynamo", 23, "sdpa"),
    Exporter("dynamo", 23, "eager"),
]

_COMMON: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
_GPT = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 16}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": LAYERS, "num_heads": 2}
_BART = {
    "d_model": 8, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
_CROSS: tuple[Literal["first_decoder", "next_decoder"], ...] = ("first_decoder", "next_decoder")


def _encoder(model_type: str, **config: Any) -> Block:
    norms = {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 1, "Gelu": LAYERS}
    return Block(model_type, norms, config)


def _llama(model_type: str, norms: int = 2 * LAYERS + 1, **config: Any) -> Block:
    expected = {"Attention": LAYERS, "RMSNormalization": norms, "RotaryEmbedding": 2 * LAYERS}
    return Block(model_type, expected, {**_GROUPED, **config})


BLOCKS = [
    _encoder("bert"),
    _encoder("roberta", max_position_embeddings=18),
    _encoder("distilbert", dim=8, n_layers=LAYERS, n_heads=2, hidden_dim=12),
    Block("gpt2", {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 1, "Gelu": LAYERS}, _GPT),
    Block(
        "gptj",
        {"Attention": LAYERS, "LayerNormalization": LAYERS + 1, "Gelu": LAYERS, "RotaryEmbedding": 2 * LAYERS},
        {**_GPT, "rotary_dim": 4},
        spelled=True,
    ),
    Block(
        "gpt_neox",
        {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 1, "Gelu": LAYERS, "RotaryEmbedding": 2 * LAYERS},
        {"rotary_pct": 0.5},
    ),
    Block(
        "opt", {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 1}, {"ffn_dim": 12, "word_embed_proj_dim": 8}
    ),
    Block(
        "bloom",
        {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 2, "Gelu": LAYERS},
        _GPT,
        spelled=True,
        why="in the TorchScript export, the shapes around the Reshape that merges heads and batch are unknown",
        lost={"Attention": 0},
    ),
    Block(
        "falcon",
        {"Attention": LAYERS, "LayerNormalization": LAYERS + 1, "Gelu": LAYERS, "RotaryEmbedding": 2 * LAYERS},
        {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False},
        unknown=("dynamo 23 sdpa",),
    ),
    _llama("llama"),
    _llama("mistral", sliding_window=4),
    _llama("qwen2"),
    _llama("qwen3", norms=4 * LAYERS + 1),
    _llama("gemma", num_key_value_heads=1),
    replace(_llama("gemma2", norms=4 * LAYERS + 1, sliding_window=4, query_pre_attn_scalar=4), spelled=True),
    Block(
        "t5",
        {"Attention": LAYERS, "RMSNormalization": 2 * LAYERS + 1},
        _T5,
        unknown=("dynamo 18 sdpa", "dynamo 20 sdpa", "dynamo 23 sdpa"),
    ),
    Block(
        "deberta-v2",
        {"Attention": 0, "LayerNormalization": 2 * LAYERS + 1, "Gelu": LAYERS},
        {"relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0, "position_buckets": 4},
        spelled=True,
        why="its scores are sums of several MatMuls, which the Attention operator cannot express",
    ),
    Block(
        "gpt2",
        {"Attention": LAYERS, "LayerNormalization": 2 * LAYERS + 1, "Gelu": LAYERS},
        {**_GPT, "n_positions": 64},
        call="decoder",
    ),
    replace(_llama("llama", max_position_embeddings=64), call="decoder"),
    replace(_llama("mistral", sliding_window=4, max_position_embeddings=64), call="decoder"),
    *(
        Block(
            "t5",
            {"Attention": 2 * LAYERS, "RMSNormalization": 3 * LAYERS + 1},
            _T5,
            call=call,
            unknown=("dynamo 18 sdpa", "dynamo 20 sdpa", "dynamo 23 sdpa"),
        )
        for call in _CROSS
    ),
    *(
        Block("bart", {"Attention": 2 * LAYERS, "LayerNormalization": 3 * LAYERS + 1, "Gelu": LAYERS}, _BART, call=call)
        for call in _CROSS
    ),
]


def build(block: Block, attention: str) -> Any:
    """The module of a block, its weights drawn with a seed."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5EncoderModel

    cached = {"use_cache": True} if block.call != "encode" else {}
    config = AutoConfig.for_model(block.model_type, **{**_COMMON, **block.config, **cached})
    torch.manual_seed(0)
    kind: dict[str, Any] = {} if block.spelled else {"attn_implementation": attention}
    if block.call == "encode":
        make = T5EncoderModel._from_config if block.model_type == "t5" else AutoModel.from_config
    else:
        make = (AutoModelForCausalLM if block.call == "decoder" else AutoModelForSeq2SeqLM).from_config
    model = make(config, **kind).eval()
    with torch.no_grad():  # fresh norms and biases are equal, and would be shared
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encode(module: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and a mask in, hidden states out."""
    return {"last_hidden_state": module(**feeds)[0]}


def sample_of(block: Block, model: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Inputs by name, and the names of their dynamic axes: two texts of three tokens, behind five where there is a
    cache, and four tokens of an encoder."""
    import torch

    tokens = torch.ones(2, 8 if block.call == "encode" else 3, dtype=torch.long)
    sample, axes = {"input_ids": tokens}, {"input_ids": {0: "batch", 1: "sequence"}}
    if block.call in ("encode", "decoder"):
        past = 5 if block.call == "decoder" else 0
        sample["attention_mask"] = torch.ones(2, past + tokens.shape[1], dtype=torch.long)
        axes["attention_mask"] = {0: "batch", 1: "past + sequence" if past else "sequence"}
    else:
        sample["encoder_attention_mask"] = torch.ones(2, 4, dtype=torch.long)
        axes["encoder_attention_mask"] = {0: "batch", 1: "encoder_sequence"}
    if block.call == "first_decoder":
        sample["encoder_hidden_states"] = torch.randn(2, 4, model.config.d_model)
        axes["encoder_hidden_states"] = {0: "batch", 1: "encoder_sequence"}
    sides = {"decoder": {"": 5}, "next_decoder": {".decoder": 5, ".encoder": 4}}.get(block.call, {})
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer in range(LAYERS):
        for side, length in sides.items():
            for kind in ("key", "value"):
                name = f"past_key_values.{layer}{side}.{kind}"
                sample[name] = torch.randn(2, heads, length, size)
                axes[name] = {0: "batch", 2: "encoder_sequence" if side == ".encoder" else "past"}
    return sample, axes


def export(block: Block, exporter: Exporter, path: Path) -> None:
    """Write one file."""
    import torch

    model = build(block, exporter.attention)
    sample, axes = sample_of(block, model)
    call = encode if block.call == "encode" else CALLS[block.call]
    with torch.no_grad():
        outputs = list(call(model, sample))
    flat = wrap(model, call, sample, outputs)
    names: dict[str, Any] = {"input_names": list(sample), "output_names": outputs, "verbose": False}
    names["opset_version"] = exporter.opset
    if exporter.way == "dynamo":
        shapes = (tuple(dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in sample),)
        program = torch.onnx.export(
            flat, tuple(sample.values()), dynamic_shapes=shapes, dynamo=True, optimize=True, **names
        )
        if program is not None:
            _name_axes(program.model, axes)
            program.save(path)
        return
    torch.onnx.export(flat, tuple(sample.values()), path, dynamic_axes=axes, dynamo=False, **names)


def _name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Call the exporter's symbols what they are; a sum keeps the name that the mask gives it."""
    shapes = [(value.shape, axes.get(value.name or "", {})) for value in model.graph.inputs]
    names = {str(shape[i]): axis for shape, own in shapes if shape is not None for i, axis in own.items()}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for shape in [value.shape for value in values if value.shape is not None]:
        for index, dim in enumerate(shape):
            if str(dim) in names:
                shape[index] = names[str(dim)]


def export_all(only: list[str]) -> None:
    """Write the archive; with names, only the files of these blocks anew."""
    logging.disable(logging.WARNING)
    known = dict(stored()) if ARCHIVE.is_file() else {}
    for block in BLOCKS:
        if only and block.name not in only:
            continue
        exporters = [e for e in EXPORTERS if not (block.spelled and e.attention == "sdpa")]
        made = {f"{block.name} {exporter}": exported(block, exporter) for exporter in exporters}
        known = {name: content for name, content in known.items() if block_of(name) is not block}
        known |= {name: content for name, content in made.items() if content is not None}
        keep(known)
    print(f"{len(known)} files, {ARCHIVE.stat().st_size / 1e6:.1f} MB")


def exported(block: Block, exporter: Exporter) -> bytes | None:
    """The file, or None if the exporter does not know the architecture, which is told."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            export(block, exporter, Path(folder) / "model.onnx")
        except Exception as error:  # noqa: BLE001 - whatever the exporter raises, the file is not there
            reason = " ".join(str(error).split())[:120]
            print(f"{block.name} {exporter}: {type(error).__name__}: {reason}", file=sys.stderr)
            return None
        return (Path(folder) / "model.onnx").read_bytes()


def keep(files: Mapping[str, bytes]) -> None:
    """Write the archive, blocks in the order of their table."""
    order = [f"{block.name} {exporter}" for block in BLOCKS for exporter in EXPORTERS]
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files, key=order.index):
            archive.writestr(zipfile.ZipInfo(f"{name}.onnx"), files[name], zipfile.ZIP_DEFLATED)


def stored() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the kept files."""
    with zipfile.ZipFile(io.BytesIO(ARCHIVE.read_bytes())) as archive:
        for name in archive.namelist():
            yield name.removesuffix(".onnx"), archive.read(name)


def raised(path: Path) -> ir.Model:
    """A file after everything that is shared by all targets."""
    model, _ = lower(path).program.sole()
    return Pipeline.parse(presets.pipeline_text("exact", "of no target")).run(model).model


def counts(model: ir.Model) -> dict[str, int]:
    """How many of the standard's high-level operators a graph has."""
    found = Counter(node.op_type for node in model.graph if node.domain == "")
    return {name: found[name] for name in RAISED}


def block_of(name: str) -> Block:
    """The block that a kept file is of."""
    return next(block for block in BLOCKS if block.name == name.split()[0])


def table() -> str:
    """The page: for each block and exporter the operators found, of those expected."""
    lines = [
        "# Fusion coverage by exporter",
        "",
        "Written by `python -m tests.exporters table` from the graphs in `tests/data/exports.zip`: tiny models of two",
        "layers, exported by PyTorch 2.13 with its TorchScript and its current (dynamo) exporter, at several opsets, attention",
        "written as `scaled_dot_product_attention` or decomposed (eager). Each cell holds, after fusion, the number of",
        "fused operators, of those that the architecture has; a test checks every cell.",
        "",
        f"| architecture | exporter | {' | '.join(RAISED)} |",
        f"| --- | --- |{' --- |' * len(RAISED)}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in stored():
            block, path = block_of(name), Path(folder) / "model.onnx"
            path.write_bytes(content)
            found = counts(raised(path))
            expected = block.expected_of(name)
            cells = [f"{found[op]} of {expected[op]}" if op in expected else "" for op in RAISED]
            lines.append(f"| {block.name} | {name.partition(' ')[2]} | {' | '.join(cells)} |")
    reasons = [f"- `{block.name}`: {block.why}." for block in BLOCKS if block.why]
    return "\n".join([*lines, "", "Not fused:", "", *reasons, ""])


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        export_all(sys.argv[2:])
    elif sys.argv[1:2] == ["table"]:
        PAGE.write_text(table(), encoding="utf-8")
    else:
        raise SystemExit("usage: python -m tests.exporters export [ARCHITECTURE…] | table")
