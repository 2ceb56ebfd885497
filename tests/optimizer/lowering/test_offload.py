"""With `--reference offload` the original answers as if it were loaded, and never holds more than a few weights."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.optimizer import optimize, verify
from planish.optimizer.errors import CheckFailed, OutOfResources, UsageError
from planish.optimizer.fidelity.inputs import make_inputs, make_prompts
from planish.optimizer.lowering import lower
from planish.optimizer.lowering.checkpoint.checkpoint import bind, initial, loaded, open_checkpoint, skeleton
from planish.optimizer.lowering.original import offload
from planish.optimizer.lowering.original.lockstep import Turnstile
from planish.optimizer.lowering.original.offload import offloaded
from planish.optimizer.lowering.original.original import Answers, TorchOriginal
from tests.conftest import Planish
from tests.optimizer.lowering.test_adapter import KINDS, adapter
from tests.zoo import GENERATORS, Species, build

DEEP = Species(
    "llama",
    "text-generation",
    {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2},
)


def species(name: str) -> Species:
    return next(own for own in GENERATORS if own.model_type == name)


def answers(checkpoint: Path, task: str, adapter_folder: Path | None = None) -> tuple[Answers, Answers]:
    """Of the loaded original, and of the one whose weights stay in the checkpoint."""
    lowered = lower(checkpoint, task, adapter=adapter_folder)
    signatures = lowered.program.signatures
    cases = {name: make_inputs(signature) for name, signature in signatures.items()}
    prompts = make_prompts(next(iter(signatures.values()))) if lowered.program.generates else []
    found = []
    for make in (loaded, offloaded):
        original = TorchOriginal(partial(make, open_checkpoint(checkpoint, task, adapter_folder)))
        original._calls = getattr(lowered.original, "_calls")  # noqa: B009 - the same calls, another module
        found.append(original.answer(cases, 1, prompts))
    return found[0], found[1]


def flat(found: Answers) -> dict[str, np.ndarray]:
    """Every array that is in the answers."""
    kinds = {"outputs": found.outputs, "precise": found.precise or {}}
    arrays = {
        f"{kind} {component} {index} {name}": array
        for kind, components in kinds.items()
        for component, own in components.items()
        for index, case in enumerate(own)
        for name, array in case.items()
    }
    for index, one in enumerate(found.continuations):
        arrays |= {f"scores {index}": one.scores, f"tokens {index}": one.tokens}
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.breadth)])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mixtral", "marian", "bert", pytest.param("t5", marks=pytest.mark.breadth)]
)
def test_the_answers_are_those_of_the_loaded_original_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    own = Species("bert", "text-classification") if name == "bert" else species(name)
    full, lazy = (flat(found) for found in answers(build(own, tmp_path / "c", dtype=dtype), own.task))
    assert full.keys() == lazy.keys()
    different = [key for key, array in full.items() if not np.array_equal(array, lazy[key], equal_nan=True)]
    assert different == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "embedding-and-head"])
def test_adapters_are_merged_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    name, config, options = KINDS[kind]
    checkpoint = build(species(name), tmp_path / "base")
    folder = adapter(checkpoint, config, options, tmp_path)
    full, lazy = (flat(found) for found in answers(checkpoint, "text-generation", folder))
    assert full.keys() == lazy.keys()
    for key, array in full.items():
        np.testing.assert_allclose(array, lazy[key], rtol=0, atol=2e-6 * float(np.abs(array).max(initial=1)))


class Watch:
    """Counts the weights that are in memory, and what was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: dict[int, int] = {}
        self.most = 0
        self.most_bytes = 0
        self.reads = 0
        monkeypatch.setattr(offload.Reader, "_make", self._watched(offload.Reader._make))

    def _watched(self, make: Any) -> Any:
        def watched(reader: Any, name: str, listed: Any) -> Any:
            made = make(reader, name, listed)
            self.reads += 1
            self.alive[self.reads] = made.nbytes
            weakref.finalize(made.untyped_storage(), self.alive.pop, self.reads)
            self.most = max(self.most, len(self.alive))
            self.most_bytes = max(self.most_bytes, sum(self.alive.values()))
            return made

        return watched


@pytest.mark.slow
def test_no_more_than_a_few_weights_are_in_memory_whatever_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(DEEP, tmp_path / "c", dtype="bfloat16")
    lowered = lower(checkpoint)
    cases = {name: make_inputs(signature) for name, signature in lowered.program.signatures.items()}
    prompts = make_prompts(lowered.program.sole()[1])
    watch = Watch(monkeypatch)
    original = TorchOriginal(lambda: offloaded(open_checkpoint(checkpoint, DEEP.task)))
    original._calls = getattr(lowered.original, "_calls")  # noqa: B009 - the same calls, another module
    original.answer(cases, 1, prompts)
    stored = bind(skeleton(opened := open_checkpoint(checkpoint, DEEP.task)), opened).stored
    largest = max(4 * int(np.prod(one.stored_shape)) for one in stored.values())
    assert watch.most <= 3
    assert watch.most_bytes <= 2 * 2 * largest  # in double precision, two at a time
    passes = 17 + 1  # one for all cases and the prompts, one a further token, one in double precision
    assert watch.reads <= passes * len(stored)


def test_halves_are_never_widened_whole(tmp_path: Path) -> None:
    opened = open_checkpoint(build(DEEP, tmp_path / "c", dtype="float16"), DEEP.task)
    module = offloaded(opened)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not module.lm_head.weight.is_meta
    assert str(module.lm_head.weight.dtype) == "torch.float32"


def test_experts_and_tables_of_sines_need_no_loaded_original(tmp_path: Path) -> None:
    mixtral = open_checkpoint(build(species("mixtral"), tmp_path / "m", dtype="bfloat16"), "text-generation")
    expected = loaded(mixtral).state_dict()
    stored = bind(skeleton(mixtral), mixtral).stored
    experts = [name for name in expected if name.endswith("experts.gate_up_proj")]
    assert len(experts) == 2
    for name in experts:
        np.testing.assert_array_equal(stored[name].read(), expected[name].numpy())
    marian = open_checkpoint(build(species("marian"), tmp_path / "t"), "text2text-generation")
    name = "model.encoder.embed_positions.weight"
    np.testing.assert_array_equal(initial(skeleton(marian), name).numpy(), loaded(marian).state_dict()[name].numpy())


@pytest.mark.breadth
def test_what_differs_is_found_in_the_saved_engine(tiny: Path, tmp_path: Path) -> None:
    result = optimize(tiny, tmp_path / "plain", reference="offload")
    record = result.manifest.targets["onnxruntime"]
    assert (result.manifest.reference.mode, record.checked_with) == ("offload", "onnxruntime{weights=mapped}")
    assert (record.shipped, record.comparison["logits"]["top1"]) == ("plain", 1)
    assert "not compared one by one" in result.manifest.reference.passes
    assert [verdict.problems for verdict in verify(tmp_path / "plain").values()] == [()]
    own = optimize(tiny, tmp_path / "own", pipeline="fuse-gelu", reference="offload").manifest.targets["onnxruntime"]
    assert (own.shipped, own.passes[0].difference) == ("optimized", None)
    assert "passes not compared one by one" in own.why
    with pytest.raises(CheckFailed, match="max_rel"):
        optimize(tiny, tmp_path / "no", pipeline="prune-ffn{keep=0.3}", keep=["max_rel<=1e-6"], reference="offload")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "target", "words"),
    [("full", "onnxruntime", "--reference offload"), ("offload", "openvino", "leave this target out")],
)
def test_what_cannot_fit_stops_before_it_is_killed(
    reference: Any, target: str, words: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "planish.optimizer.driver.optimize.lower", lower
    )  # with a process for the original, as users have it
    monkeypatch.setattr("planish.optimizer.system.machine.available_memory", lambda: 1000)
    with pytest.raises(OutOfResources, match=r"0\.0 GB are available") as caught:
        optimize(tiny, tmp_path / "out", targets=[target], reference=reference)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_line_takes_it_and_a_file_does_not(tiny: Path, tmp_path: Path, command: Planish) -> None:
    done = command("optimize", tiny, "-o", tmp_path / "out", "--reference", "offload", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"]["reference"]["mode"] == "offload"
    with pytest.raises(UsageError, match="checkpoint folder"):
        optimize(tmp_path / "out/onnxruntime/model.onnx", tmp_path / "again", reference="offload")


def test_calls_side_by_side_share_what_they_read() -> None:
    turnstile = Turnstile()
    read: list[str] = []

    def call(wanted: Sequence[str]) -> str:
        for what in wanted:
            turnstile.wait_for(what)
            if read[-1:] != [what]:
                read.append(what)
        return "".join(wanted)

    assert turnstile.together([lambda: call("abcd"), lambda: call("abd"), lambda: call("abcd")]) == [
        "abcd",
        "abd",
        "abcd",
    ]
    assert read == ["a", "b", "c", "d"]


def test_a_call_that_fails_lets_the_others_end() -> None:
    turnstile = Turnstile()

    def call(fails: bool) -> None:
        turnstile.wait_for("a")
        if fails:
            raise ValueError("this one")
        turnstile.wait_for("b")

    with pytest.raises(ValueError, match="this one"):
        turnstile.together([lambda: call(False), lambda: call(True), lambda: call(False)])
