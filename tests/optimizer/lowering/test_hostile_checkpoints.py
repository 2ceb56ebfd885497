"""Checkpoints and adapters that were made to break their reader: refused in one line, quickly, with the right code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from planish.optimizer.errors import BadInput, MissingRuntime, OutOfResources, PlanishError
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.checkpoint import bind, loaded, open_checkpoint, skeleton
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.system.links import file_in
from tests.conftest import Planish
from tests.optimizer.cli.test_bad_input import (
    BAD_INPUT,
    configure,
    first_tensor,
    refused,
    rewrite_header,
    sharded,
    weights,
    write,
)
from tests.optimizer.lowering.test_adapter import adapter, base, copied, edited

DEEP = b"[" * 100_000


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def raw_header(text: bytes) -> Callable[[Path], object]:
    return write("model.safetensors", len(text).to_bytes(8, "little") + text)


def renamed(folder: Path, name: str) -> None:
    def change(header: dict[str, Any]) -> None:
        key = next(key for key in header if key != "__metadata__")
        header[name] = header.pop(key)

    rewrite_header(folder, change)


def indexed(folder: Path, **changes: object) -> None:
    """Two shards, whose index says something else."""
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def deep_index(folder: Path) -> None:
    sharded(folder)
    write("model.safetensors.index.json", DEEP)(folder)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep config": (write("config.json", DEEP), "config.json: this is nested deeper than 64 levels"),
    "deep tokenizer settings": (write("tokenizer_config.json", DEEP), "this is nested deeper"),
    "deep index": (deep_index, "index.json: this is nested deeper"),
    "deep header": (raw_header(DEEP), "its header is not readable (this is nested deeper"),
    "header in UTF-16": (raw_header('{"x": 1}'.encode("utf-16")), "its header is not readable"),
    "header of a list": (raw_header(b"[]"), "it is no object"),
    "architectures of a number": (lambda f: configure(f, architectures=5), "its architectures are no list of names"),
    "architectures of numbers": (lambda f: configure(f, architectures=[5]), "its architectures are no list of names"),
    "model type of 10 MB": (lambda f: configure(f, model_type="x" * 10_000_000), "transformers has no architecture"),
    "infinite shape": (lambda f: rewrite_header(f, lambda h: first_tensor(h).update(shape=[float("inf")])), "sizes"),
    "broken shape": (lambda f: rewrite_header(f, lambda h: first_tensor(h).update(shape=[24.0])), "is no list of sizes"),
    "true as a shape": (lambda f: rewrite_header(f, lambda h: first_tensor(h).update(shape=[True])), "no list of sizes"),
    "broken offsets": (
        lambda f: rewrite_header(f, lambda h: first_tensor(h).update(data_offsets=[0.0, 96.0])),
        "is no list of sizes",
    ),
    "metadata of a number": (lambda f: rewrite_header(f, lambda h: h.update(__metadata__=5)), "is not a whole safetens"),  # type: ignore[call-overload]
    "half a character": (lambda f: renamed(f, "\ud800"), "half of a surrogate pair"),
    "index of numbers": (lambda f: indexed(f, weight_map={"x": 5}), "has no weight_map from names"),
    "index of a list": (lambda f: indexed(f, weight_map=[]), "has no weight_map from names"),
    "metadata of the index": (lambda f: indexed(f, metadata=5), "the metadata of the shard index"),
    "shard with a long name": (lambda f: indexed(f, weight_map={"x": "y" * 5000}), "lies outside"),
    "shard with a zero": (lambda f: indexed(f, weight_map={"x": "y\0"}), "lies outside"),
    "padding behind the vocabulary": (lambda f: configure(f, pad_token_id=5000), "cannot be built from it: Assertion"),
    "another file of weights": (lambda f: configure(f, transformers_weights="x.safetensors"), "names the file of its"),
    "an adapter inside": (write("adapter_config.json", b"{}"), "lies in the checkpoint's own folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, message = HOSTILE[name]
    damage(checkpoint)
    refused(BAD_INPUT, message, "optimize", checkpoint, "-o", tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path != checkpoint] == []


GREEDY: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 1_000_000}, "it asks for 1000000 num_hidden_layers"),
    "some layers": ({"num_hidden_layers": 400}, "it asks for more than 11"),
    "labels": ({"num_labels": 10**9}, "it asks for 1000000000 num_labels"),
    "nested layers": ({"text_config": {"n_layers": 10**9}}, "it asks for 1000000000 n_layers"),
    "positions": ({"max_position_embeddings": 1 << 40}, "it asks for a table of"),
    "segments of a word": ({"type_vocab_size": "gelu"}, "transformers refuses it"),
    "words": ({"vocab_size": 1 << 40}, "it asks for a table of"),
    "width": ({"intermediate_size": 1 << 40}, "it asks for a table of"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_settings_that_would_take_the_machine(name: str, checkpoint: Path) -> None:
    changes, message = GREEDY[name]
    configure(checkpoint, **changes)
    with pytest.raises(BadInput) as caught:
        loaded(open_checkpoint(checkpoint, "text-classification"))
    assert message in str(caught.value)


ORIGINALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "generation settings of a number": (write("generation_config.json", b"5"), "transformers cannot load it"),
    "suppressed tokens of a number": (
        write("generation_config.json", b'{"suppress_tokens": 5, "num_beams": "x"}'),
        "transformers cannot load it",
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_transformers_cannot_load_is_bad_input(name: str, tmp_path: Path) -> None:
    checkpoint = base("gpt2", tmp_path)
    damage, message = ORIGINALS[name]
    damage(checkpoint)
    with pytest.raises(BadInput, match=message):
        loaded(open_checkpoint(checkpoint, "text-generation"))


@pytest.mark.slow
@pytest.mark.breadth
def test_the_process_of_the_original_says_what_it_cannot_read(tmp_path: Path, planish: Planish) -> None:
    """It blames no pass, and leaves nothing."""
    checkpoint = base("gpt2", tmp_path)
    write("generation_config.json", b"5")(checkpoint)
    done = planish("optimize", checkpoint, "-o", tmp_path / "out", "--task", "text-generation")
    assert done.returncode == BAD_INPUT, done.stderr
    assert "transformers cannot load it" in done.stderr.splitlines()[-1]
    assert "reproduce" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
def test_an_original_that_gives_no_finite_number(checkpoint: Path, tmp_path: Path, command: Planish) -> None:
    """Engines that give none either would be equal to it."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["classifier.bias"] = torch.full_like(tensors["classifier.bias"], float("nan"))
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    done = command("optimize", checkpoint, "-o", tmp_path / "out", "--pipeline", "fold-constants")
    assert done.returncode == BAD_INPUT, done.stderr
    assert "the original gives no finite number for 'logits'" in done.stderr.splitlines()[-1]
    assert "reproduce" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (AssertionError(), BadInput, "it fails: AssertionError"),
        (ValueError("a\nb"), BadInput, "it fails: ValueError: a b"),
        (ImportError("no bitsandbytes"), MissingRuntime, "a package is missing .*no bitsandbytes"),
        (RuntimeError("[enforce fail] not enough memory: you tried"), OutOfResources, "needs more memory"),
        (MemoryError(), OutOfResources, "needs more memory"),
        (MissingRuntime("ours"), MissingRuntime, "^ours$"),
    ],
)
def test_what_libraries_raise_is_told_as_ours(raised: Exception, kind: type[PlanishError], says: str) -> None:
    with pytest.raises(kind, match=says), told_as_bad_input("it fails", None):
        raise raised


LINKED = ("chat_template.jinja", "vocab.txt", "config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("name", LINKED)
def test_links_to_the_outside_are_not_followed(name: str, checkpoint: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine") if not (checkpoint / name).exists() else (checkpoint / name).rename(secret)
    (checkpoint / name).symlink_to(secret)
    refused(BAD_INPUT, f"{name}: this is a link to a file outside", "optimize", checkpoint, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_links_to_the_outside_are_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (checkpoint / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="outside"):
        lower(checkpoint)


def test_links_beside_an_onnx_file_are_not_followed(tmp_path: Path) -> None:
    from tests.optimizer.cli.test_bad_onnx_files import graph, saved

    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model" / "vocab.txt").symlink_to(tmp_path / "secret")
    file = saved(tmp_path / "model", graph())
    refused(BAD_INPUT, "vocab.txt: this is a link to a file outside", "optimize", file, "-o", tmp_path / "out")


def test_links_of_the_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert len(lower(snapshot).companions) >= 3
    other = tmp_path / "models--someone--else" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("mine")
    (snapshot / "vocab.txt").symlink_to(other / "secret")
    with pytest.raises(BadInput, match="outside"):
        lower(snapshot)


def test_links_inside_of_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "real" / "b.txt").symlink_to("a.txt")
    (tmp_path / "way").symlink_to("real")
    assert file_in(tmp_path / "way", "b.txt") == tmp_path / "way" / "b.txt"
    assert file_in(tmp_path / "way", "c.txt") is None
    os.mkfifo(tmp_path / "real" / "pipe")
    assert file_in(tmp_path / "real", "pipe") is None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = base("llama", folder)
    return checkpoint, adapter(checkpoint, "LoraConfig", {"target_modules": ["q_proj"]}, folder)


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank of a word": ({"r": "x"}, "a rank in it is not a positive number"),
    "rank of nothing": ({"r": 0, "use_rslora": True}, "a rank in it is not a positive number"),
    "alpha of a word": ({"lora_alpha": "x"}, "an alpha in it is not a number"),
    "alpha without end": ({"lora_alpha": 10**400}, "an alpha in it is not a number"),
    "alpha that is none": ({"lora_alpha": float("nan")}, "an alpha in it is not a number"),
    "alphas of a number": ({"alpha_pattern": 5}, "its alpha_pattern is no table"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, "a pattern in it is no regular expression"),
    "tokens of a number": ({"trainable_token_indices": 5}, "trainable_token_indices=5 is not supported"),
    "parameters of a number": ({"target_parameters": 5}, "target_parameters=5 is not supported"),
    "eva of a number": ({"eva_config": 5}, "eva_config=5 is not supported"),
    "a base that is decomposed": ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not supported"),
    "other modules": (
        {"target_modules": ["o_proj"]},
        "it has weights for 'model.layers.0.self_attn.q_proj', which its",
    ),
    "excluded modules": ({"exclude_modules": ["q_proj"]}, "which its target_modules do not name"),
    "modules of numbers": ({"modules_to_save": [5]}, "a name of modules in it is no text"),
    "a kind of a list": ({"peft_type": ["LORA"]}, "are not supported"),
    "no kind": ({"peft_type": None}, "it names no peft_type"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    changes, message = ADAPTERS[name]
    made = copied(pair, tmp_path)
    edited(made, **changes)
    with pytest.raises(BadInput) as caught:
        lower(pair[0], "text-generation", adapter=made)
    assert message in str(caught.value)


def test_an_adapter_of_deep_lists(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = copied(pair, tmp_path)
    (made / "adapter_config.json").write_bytes(DEEP)
    with pytest.raises(BadInput, match="nested deeper"):
        lower(pair[0], "text-generation", adapter=made)


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["nothing"]}, {"modules_to_save": ["nothing"], "target_modules": ["q"]}, {"r": 17}]
)
def test_what_peft_refuses_is_bad_input(changes: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = copied(pair, tmp_path)
    edited(made, **changes)
    with pytest.raises(BadInput, match=r"peft cannot merge the adapter|do not name"):
        loaded(open_checkpoint(pair[0], "text-generation", made))


ENDLESS = "(([a-z.0-9_])+)+!"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": {ENDLESS: 1}},
        {"rank_pattern": {ENDLESS: 1}},
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"modules_to_save": [ENDLESS]},
    ],
    ids=lambda changes: str(*changes),
)
def test_patterns_that_never_end(
    changes: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planish.optimizer.lowering.checkpoint.adapter._PATIENCE", 0.5)
    made = copied(pair, tmp_path)
    edited(made, **changes)
    opened = open_checkpoint(pair[0], "text-generation", made)
    for read in (lambda: bind(skeleton(opened), opened), lambda: loaded(opened)):
        with pytest.raises(BadInput, match=r"its patterns take longer than 0\.5 s"):
            read()


def test_an_adapter_with_cut_weights_and_links(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = copied(pair, tmp_path)
    shutil.copy(made / "adapter_config.json", tmp_path / "secret")
    (made / "adapter_config.json").unlink()
    (made / "adapter_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="outside"):
        lower(pair[0], "text-generation", adapter=made)
    assert weights(pair[0]).is_file()


def test_experts_that_cannot_be_put_together_are_bad_input(tmp_path: Path) -> None:
    checkpoint = base("mixtral", tmp_path)

    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if "experts.1" in name)
        header[name]["shape"].reverse()

    rewrite_header(checkpoint, change)
    opened = open_checkpoint(checkpoint, "text-generation")
    with pytest.raises(BadInput, match="its tensors are not those of MixtralForCausalLM"):
        bind(skeleton(opened), opened)
