"""Reference inputs and outputs of a build."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from planish.optimizer.calibration.data import Samples, one_behind_the_other
from planish.optimizer.calibration.sources import tokenizer_of
from planish.optimizer.compilation.job import Checks
from planish.optimizer.compilation.progress import Stages
from planish.optimizer.compilation.request import Request
from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.engine_check import demand_room
from planish.optimizer.fidelity.inputs import make_inputs, make_prompts, quick
from planish.optimizer.fidelity.reference import Reference, References, noise_floor
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.graph import is_random, location_of, weight_bytes
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering import Lowered
from planish.optimizer.lowering.original.original import Answers
from planish.optimizer.runtime.cases import Case, thin

_PRECISE_CASES = 1
"""The noise floor is estimated on this many of the first reference cases: made ones begin with a small padded batch."""


def ask_original(
    lowered: Lowered, request: Request, data: Samples | None, checks: Checks, stages: Stages
) -> tuple[dict[str, list[Arrays]], Callable[[], References] | None]:
    """Reference inputs, and the function that waits for the original's outputs; nothing if it shall not run.

    With `offload` it answers now: two who read all weights at once would need twice the memory.
    """
    if checks is Checks.NONE:
        return {}, None
    if checks is Checks.OFFLOAD and request.preset is not None:  # before anything is read
        plain = max(weight_bytes(model) for model in lowered.program.components.values())
        for target in request.targets:
            demand_room(target, plain)
    inputs = reference_inputs(lowered, data)
    references = ask_references(lowered, inputs)
    if checks is Checks.OFFLOAD:
        with stages.stage("reference"):
            references()
    return inputs, references


def reference_inputs(lowered: Lowered, data: Samples | None) -> dict[str, list[Arrays]]:
    """Reference inputs by component: the user's, and the longest that the signature allows; or all from the signature.

    The user's are for the component that takes texts, which is the first.
    """
    made: dict[str, list[Arrays]] = {
        name: list(make_inputs(signature)) for name, signature in lowered.program.signatures.items()
    }
    if data is None:
        return made
    first, signature = next(iter(lowered.program.signatures.items()))
    given = data.reference(signature, tokenizer_of(lowered))
    return made | {first: [*given, one_behind_the_other(given, made[first][-1], signature)]}


def ask_references(lowered: Lowered, inputs: Mapping[str, Sequence[Arrays]]) -> Callable[[], References]:
    """Start the original on the inputs; the function that is returned waits for it once."""
    first = next(iter(lowered.program.signatures.values()))
    prompts = make_prompts(first) if lowered.program.generates else []
    finish = lowered.original.start(inputs, _PRECISE_CASES, prompts)

    @functools.cache
    def references() -> References:
        answers = finish()
        found = {name: _reference(lowered, name, own, answers) for name, own in inputs.items()}
        return References(found, tuple(answers.continuations))

    return references


def _refuse_infinite(outputs: Sequence[Arrays], where: str) -> None:
    """BadInput for an output without a finite number in any case: engines that give none either would be equal."""
    for name in outputs[0]:
        arrays = [case[name] for case in outputs if name in case and case[name].dtype.kind == "f"]
        if arrays and not any(np.isfinite(array).any() for array in arrays):
            raise BadInput(
                f"the original gives no finite number for {name!r}, whatever goes in",
                where=where,
                advice="its weights or its configuration are broken: run it in PyTorch",
            )


def _reference(lowered: Lowered, component: str, inputs: Sequence[Arrays], answers: Answers) -> Reference:
    outputs = answers.outputs[component]
    if lowered.program.provenance.kind != "onnx":  # a file may have an output that is infinite for made-up inputs
        _refuse_infinite(outputs, f"{lowered.program.provenance.architecture}, {component}")
    precise = None if answers.precise is None else answers.precise[component]
    few = 0 if precise is None else len(precise)
    noise = noise_floor(lowered.program.signatures[component], inputs[:few], outputs[:few], precise)
    return Reference(tuple(inputs), tuple(outputs), noise, lowered.original.description)


def file_reference(lowered: Lowered) -> Reference:
    """Small made inputs of a lowered ONNX file, and what the file itself, unoptimized, makes of them."""
    signature = lowered.program.sole()[1]
    inputs = quick(make_inputs(signature))
    (component,) = lowered.program.components
    return _reference(lowered, component, inputs, lowered.original.answer({component: inputs}, _PRECISE_CASES))


_DRAWS = 8
"""Further runs of a graph that may draw numbers."""


def refuse_random(lowered: Lowered, engine: Engine, inputs: Sequence[Case]) -> None:
    """BadInput for a graph that gives other outputs when it runs again: it draws them."""
    drawn = next((node for graph in lowered.program.sole()[0].graphs() for node in graph if is_random(node)), None)
    if drawn is None:
        return
    for case in inputs:
        first = thin(case, engine.run(case))
        # Several times: a few entries, each kept or dropped, are the same twice by chance.
        again = (thin(case, engine.run(case)) for _ in range(_DRAWS))
        if any(not np.array_equal(first[name], other[name], equal_nan=True) for other in again for name in first):
            raise BadInput(
                "this draws other numbers in each run, so that nothing can be compared with them",
                where=location_of(drawn),
                advice="export the model for inference, or leave the comparison out (--no-check)",
            )
