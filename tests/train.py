"""Trains the small models of `tests/data/models`: `python -m tests.train`, some minutes on two cores.

`writer` is a GPT-2 of a million weights that goes on with docstrings of Python's standard library. `translator` is a T5
that turns English number words into German ones; it is trained on three quarters of the numbers below ten thousand.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "data" / "models"
PREFIX = "translate English to German: "
_WRITER_STEPS, _TRANSLATOR_STEPS = 1500, 1600
_LENGTH, _BATCH = 64, 32

_ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_ENGLISH_TENS = [
    "-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip
_GERMAN = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]  # fmt: skip
_GERMAN_TENS = [
    "-", "-", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig",
]  # fmt: skip


def english(number: int) -> str:
    """`english(342)` is "three hundred forty two"."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{english(number // size)} {name}" + (f" {english(rest)}" if rest else "")
    if number < 20:
        return _ENGLISH[number]
    return _ENGLISH_TENS[number // 10] + (f" {_ENGLISH[number % 10]}" if number % 10 else "")


def german(number: int, *, last: bool = True) -> str:
    """`german(342)` is "dreihundertzweiundvierzig"."""
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if number >= size:
            rest = number % size
            return german(number // size, last=False) + name + (german(rest) if rest else "")
    if number < 20:
        return "ein" if number == 1 and not last else _GERMAN[number]
    unit = number % 10
    return (f"{'ein' if unit == 1 else _GERMAN[unit]}und" if unit else "") + _GERMAN_TENS[number // 10]


def pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """Prompts and answers; every fourth number, in an order drawn once, is held out of training."""
    numbers = list(range(10_000))
    random.Random(0).shuffle(numbers)
    return [(PREFIX + english(n), german(n)) for index, n in enumerate(numbers) if (index % 4 == 0) == held_out]


def docstrings(files: str = "*.py") -> Iterator[str]:
    """Docstrings of files of the standard library, in their order; the writer is trained on those of no package."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob(files)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def train_writer(folder: Path) -> None:
    """Byte pairs of the docstrings, and a small GPT-2 that predicts them."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    texts = list(docstrings())
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=1024, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        eos_token="<end>",
        bos_token="<end>",
        pad_token="<end>",
        model_max_length=256,
    )
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))

    def batch() -> dict[str, Any]:
        starts = torch.randint(len(ids) - _LENGTH, (_BATCH,))
        rows = torch.stack([ids[start : start + _LENGTH] for start in starts])
        return {"input_ids": rows, "labels": rows}

    _fit(model, batch, _WRITER_STEPS)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_translator(folder: Path) -> None:
    """Characters of both languages, and a small T5."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from tokenizers import decoders as decoding
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    examples = pairs(held_out=False)
    letters = sorted({letter for pair in examples for text in pair for letter in text})
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    pieces = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pieces.decoder = decoding.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    torch.manual_seed(0)
    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(words), **sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
        )
    )
    generator = random.Random(1)

    def batch() -> dict[str, Any]:
        chosen = generator.sample(examples, 64)
        asked = tokenizer([text for text, _ in chosen], padding=True, return_tensors="pt")
        wanted = tokenizer([text for _, text in chosen], padding=True, return_tensors="pt")["input_ids"]
        return {**asked, "labels": wanted.masked_fill(wanted == 0, -100)}

    _fit(model, batch, _TRANSLATOR_STEPS)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit(model: Any, batch: Any, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        inputs = {name: value for name, value in batch().items() if name != "token_type_ids"}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"{type(model).__name__} step {step}: loss {loss.item():.3f}", file=sys.stderr)
    model.eval()


if __name__ == "__main__":
    train_writer(MODELS / "writer")
    train_translator(MODELS / "translator")
