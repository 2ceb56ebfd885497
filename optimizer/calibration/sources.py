"""Sources of calibration data: the user, the model itself, or the signature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from planish.optimizer.calibration.data import Given, Samples, one_behind_the_other
from planish.optimizer.calibration.self_generated import SelfGeneratedData
from planish.optimizer.errors import UsageError
from planish.optimizer.fidelity.inputs import make_inputs
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces import registry
from planish.optimizer.ir.program import Arrays, Signature
from planish.optimizer.lowering import Lowered
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer

GIVEN = "given"
"""The origin of the user's own inputs."""


def samples_of(calibration: Given | None, samples: int | None) -> Samples | None:
    """The user's inputs, or None; UsageError if only their number is given."""
    if calibration is None and samples is not None:
        raise UsageError("samples of nothing were asked for", where="--samples", advice="give --calibration")
    return None if calibration is None else Samples.of(calibration, samples)


def digest_of_data(lowered: Lowered, data: Samples | None) -> str:
    """The identity of calibration data in a lock."""
    return origin_of_data(lowered, data) if data is None else data.digest()


def tokenizer_of(lowered: Lowered) -> Any | None:
    """The tokenizer of a checkpoint folder; None for other sources and for checkpoints without one."""
    return None if lowered.folder is None else load_tokenizer(lowered.folder)


def calibration_batches(
    lowered: Lowered,
    data: Samples | None,
    inputs: Mapping[str, Sequence[Arrays]],
    references: Callable[[], References] | None,
) -> dict[str, Callable[[], Iterable[Arrays]]]:
    """Calibration data of each component: the user's data, generated data, or the reference inputs.

    The user's data are for the first component, which takes texts; the others get their inputs during generation.
    """
    signatures = lowered.program.signatures
    reference_inputs = {n: list(inputs.get(n) or make_inputs(signature)) for n, signature in signatures.items()}
    batches: dict[str, Callable[[], Iterable[Arrays]]] = {
        name: functools.partial(iter, cases) for name, cases in reference_inputs.items()
    }
    first, signature = next(iter(signatures.items()))
    if data is not None:
        if not inputs:  # without reference inputs the data have not been checked against the signature yet
            data.reference(signature, tokenizer_of(lowered))
        batches[first] = functools.partial(_given, data, signature, tokenizer_of(lowered), reference_inputs[first][-1])
    if lowered.program.generates and references is not None:
        generated = SelfGeneratedData(lowered.program.components, registry.interpreter().load)
        if signature.cached and data is None:
            batches[first] = functools.partial(generated.texts, signature)
        for name in [name for name in signatures if name != first]:
            batches[name] = functools.partial(_inputs_during_generation, generated, name, batches[first], references)
    return batches


def _given(data: Samples, signature: Signature, tokenizer: Any | None, longest: Arrays) -> Iterable[Arrays]:
    """The user's data, and the longest input filled with their tokens, since accuracy is checked at that length too."""
    kept: list[Arrays] = []
    for batch in data.batches(signature, tokenizer):
        # Enough batches to fill the longest input; all of them would not fit into memory.
        if sum(case[next(iter(case))].size for case in kept) < longest[next(iter(longest))].size:
            kept.append(batch)
        yield batch
    joined = one_behind_the_other(kept, longest, signature)
    if joined is not longest:
        yield joined


def origin_of_data(lowered: Lowered, data: Samples | None) -> str:
    """A short description of calibration data."""
    writes = lowered.program.generates and next(iter(lowered.program.signatures.values())).cached
    return GIVEN if data is not None else "written by the model itself" if writes else "made from the signature"


def _inputs_during_generation(
    generated: SelfGeneratedData,
    name: str,
    prompts: Callable[[], Iterable[Arrays]],
    references: Callable[[], References],
) -> Iterable[Arrays]:
    return generated.parts(name, prompts(), references().continuations[0].start[0])
