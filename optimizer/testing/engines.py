"""Checks of what a backend writes, and of the engines that it opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from planish.optimizer.errors import BadInput, CheckFailed
from planish.optimizer.fidelity.metrics import compare
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays, Program, Role
from planish.optimizer.testing.programs import decoder, encoder, expected, tokens
from planish.optimizer.testing.subject import Check, Subject, demand

_SIZES = ((1, 1), (1, 5), (3, 4), (2, 9))
"""Texts and tokens: each axis changes by itself, and both at once."""
_THREADS, _CALLS, _STEPS = 4, 40, 3


def check_emission(subject: Subject) -> None:
    """`emit` writes the file that `open` reads, and the same bytes each time, which name no place."""
    program = encoder()
    places = [subject.emitted(program, name) for name in ("one", "another")]
    file = places[0] / subject.backend.model_file
    demand(file.is_file(), f"emit() writes no {subject.backend.model_file}, which model_file names")
    first, second = (
        {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in places
    )
    demand(first.keys() == second.keys(), f"two emissions write other files: {sorted(first)} and {sorted(second)}")
    for name, content in first.items():
        demand(content == second[name], f"two emissions write other bytes into {name}")
        demand(str(subject.folder).encode() not in content, f"{name} names the folder that it was written to")


def check_opening(subject: Subject) -> None:
    """An opened engine has the inputs and outputs of the program; a folder without an engine is refused."""
    program = encoder()
    engine = subject.engine(program)
    _, signature = program.sole()
    for kind in ("inputs", "outputs"):
        names = [tensor.name for tensor in getattr(engine, kind)]
        wanted = [tensor.name for tensor in getattr(signature, kind)]
        demand(sorted(names) == sorted(wanted), f"the engine has the {kind} {names}, the program {wanted}")
    empty = subject.folder / "empty"
    empty.mkdir()
    _demand_refusal(partial(subject.backend.open, empty), "a folder without an engine")


def check_outputs(subject: Subject) -> None:
    """Outputs are those of the reference at sizes that differ from call to call, and a mask may be left out."""
    program = encoder()
    engine, cases = subject.engine(program), [tokens(*size) for size in _SIZES]
    _demand_close(subject, program, cases, [engine.run(case) for case in cases])
    whole = {"input_ids": tokens(1, 5)["input_ids"]}
    _demand_close(subject, program, [{**whole, "attention_mask": np.ones((1, 5), np.int64)}], [engine.run(whole)])
    run = engine.prepare(cases[2])
    run()
    _demand_close(subject, program, cases[1:2], [engine.run(cases[1])])


def check_refusals(subject: Subject) -> None:
    """Inputs that are unknown, missing, of another type or of another shape are refused as bad input."""
    engine, case = subject.engine(encoder()), tokens(2, 5)
    wrong: Mapping[str, Arrays] = {
        "an unknown input": {**case, "no_such_input": np.zeros(1, np.float32)},
        "tokens that are missing": {"attention_mask": case["attention_mask"]},
        "tokens of type float": {**case, "input_ids": case["input_ids"].astype(np.float32)},
        "tokens of rank 3": {**case, "input_ids": case["input_ids"][None]},
        "a mask of another length": {**case, "attention_mask": np.ones((2, 3), np.int64)},
    }
    for what, inputs in wrong.items():
        _demand_refusal(partial(engine.run, inputs), what)
    _demand_close(subject, encoder(), [case], [engine.run(case)])  # a refused call leaves the engine as it was


def check_components(subject: Subject) -> None:
    """A program of two components is refused by `emit`, or each of them is opened and run."""
    program = encoder()
    model, signature = program.sole()
    names = ("encoder_model", "decoder_model")
    both = replace(
        program,
        components={name: model.clone() for name in names},
        signatures=dict.fromkeys(names, signature),
    )
    try:
        place = subject.emitted(both)
    except CheckFailed:
        return
    for name in names:
        path = subject.backend.path_of(name, place)
        demand(path.is_file(), f"emit() writes no {path.name} for the component {name}")
        case = tokens(2, 5)
        _demand_close(subject, program, [case], [subject.opened(path).run(case)])


def check_decoder(subject: Subject) -> None:
    """Steps behind a cache give the scores of the whole text; rows of a cache can be selected."""
    program = decoder()
    engine, case = subject.engine(program), tokens(2, 6)
    case["attention_mask"][:] = 1
    empty = {t.name: np.zeros((2, 2, 0, 4), np.float32) for t in program.sole()[1].inputs if t.role is Role.CACHE}
    _demand_close(subject, program, [{**case, **empty}], [engine.run({**case, **empty})])
    scores = _stepped(engine, case)
    wanted = expected(program, [{**case, **empty}])[0]["logits"][:, -_STEPS:]
    _demand_scores(subject, program, wanted, scores)
    outputs, cache = engine.step(_part(case, 0, 5))
    turned = engine.select(cache, np.array([1, 0]))
    outputs, _ = engine.step({name: array[::-1] for name, array in _part(case, 5, 6).items()}, turned)
    _demand_scores(subject, program, wanted[::-1, -1:], outputs["logits"])


def check_threads(subject: Subject) -> None:
    """An engine that several threads call at once gives each what it gets alone."""
    engine = subject.engine(encoder())
    cases = [tokens(1 + number % 3, 2 + number % 7) for number in range(_CALLS)]
    alone = [engine.run(case) for case in cases]
    with ThreadPoolExecutor(_THREADS) as pool:
        together = list(pool.map(engine.run, cases))
    _demand_budget(subject, encoder(), cases, alone, together, "calls of several threads disturb each other")


def _stepped(engine: Engine, case: Arrays) -> np.ndarray:
    """Scores of the last tokens, each behind the cache of what was before it."""
    length = case["input_ids"].shape[1]
    _, cache = engine.step(_part(case, 0, length - _STEPS))
    scores = []
    for position in range(length - _STEPS, length):
        outputs, cache = engine.step(_part(case, position, position + 1), cache)
        scores.append(outputs["logits"])
    return np.concatenate(scores, axis=1)


def _part(case: Arrays, start: int, end: int) -> dict[str, np.ndarray]:
    """Tokens from ``start`` to ``end``, and the mask of all up to there."""
    return {"input_ids": case["input_ids"][:, start:end], "attention_mask": case["attention_mask"][:, :end]}


def _demand_close(
    subject: Subject, program: Program, cases: Sequence[Arrays], outputs: Sequence[dict[str, np.ndarray]]
) -> None:
    """CheckFailed if outputs are not those of the reference."""
    _demand_budget(subject, program, cases, expected(program, cases), outputs, "outputs differ from the reference")


def _demand_scores(subject: Subject, program: Program, wanted: np.ndarray, scores: np.ndarray) -> None:
    """CheckFailed if scores of steps are not those of the whole text."""
    what = "steps behind a cache differ from the whole text"
    _demand_budget(subject, program, [{}], [{"logits": wanted}], [{"logits": scores}], what)


def _demand_budget(
    subject: Subject,
    program: Program,
    cases: Sequence[Arrays],
    wanted: Sequence[dict[str, np.ndarray]],
    outputs: Sequence[dict[str, np.ndarray]],
    otherwise: str,
) -> None:
    """CheckFailed if outputs are outside of the budget, are missing or have another shape."""
    try:
        violations = subject.budget.violations(compare(program.sole()[1], cases, wanted, outputs))
    except ValueError as error:
        raise CheckFailed(f"{otherwise}: {error}") from error
    demand(not violations, f"{otherwise}: {'; '.join(violations)}")


def _demand_refusal(call: Callable[[], object], what: str) -> None:
    """CheckFailed if a call takes what it should refuse with BadInput."""
    try:
        call()
    except BadInput:
        return
    except Exception as error:
        raise CheckFailed(f"{what}: it raises {type(error).__name__} instead of BadInput") from error
    raise CheckFailed(f"{what}: it is taken, instead of BadInput")


CHECKS: dict[str, Check] = {
    "emission": check_emission,
    "opening": check_opening,
    "outputs": check_outputs,
    "refusals": check_refusals,
    "components": check_components,
    "decoder": check_decoder,
    "threads": check_threads,
}
