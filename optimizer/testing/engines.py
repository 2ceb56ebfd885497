"""Checks of the engines that a backend opens."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from planish.optimizer.errors import CheckFailed
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.program import Arrays, Role
from planish.optimizer.testing.comparison import demand_budget, demand_close, demand_refusal, demand_scores
from planish.optimizer.testing.programs import decoder, encoder, expected, tokens
from planish.optimizer.testing.subject import Check, Subject, demand, unchanged

_SIZES = ((1, 1), (1, 5), (3, 4), (2, 9))
"""Texts and tokens: each axis changes by itself, and both at once."""
_THREADS, _CALLS, _STEPS = 4, 40, 3


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
    demand_refusal(partial(subject.backend.open, empty), "a folder without an engine")


def check_outputs(subject: Subject) -> None:
    """Outputs are those of the reference at sizes that differ from call to call, and a mask may be left out."""
    program = encoder()
    engine, cases = subject.engine(program), [tokens(*size) for size in _SIZES]
    demand_close(subject, program, cases, [engine.run(case) for case in cases])
    whole = {"input_ids": tokens(1, 5)["input_ids"]}
    demand_close(subject, program, [{**whole, "attention_mask": np.ones((1, 5), np.int64)}], [engine.run(whole)])
    run = engine.prepare(cases[2])
    run()
    demand_close(subject, program, cases[1:2], [engine.run(cases[1])])


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
        demand_refusal(partial(engine.run, inputs), what)
    demand_close(subject, encoder(), [case], [engine.run(case)])  # a refused call leaves the engine as it was


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
        demand_close(subject, program, [case], [subject.opened(path).run(case)])


def check_decoder(subject: Subject) -> None:
    """Steps behind a cache give the scores of the whole text; rows of a cache can be selected."""
    program = decoder()
    engine, case = subject.engine(program), tokens(2, 6)
    case["attention_mask"][:] = 1
    empty = {t.name: np.zeros((2, 2, 0, 4), np.float32) for t in program.sole()[1].inputs if t.role is Role.CACHE}
    demand_close(subject, program, [{**case, **empty}], [engine.run({**case, **empty})])
    scores = _stepped(engine, case)
    wanted = expected(program, [{**case, **empty}])[0]["logits"][:, -_STEPS:]
    demand_scores(subject, program, wanted, scores)
    outputs, cache = engine.step(_part(case, 0, 5))
    turned = engine.select(cache, np.array([1, 0]))
    outputs, _ = engine.step({name: array[::-1] for name, array in _part(case, 5, 6).items()}, turned)
    demand_scores(subject, program, wanted[::-1, -1:], outputs["logits"])


def check_threads(subject: Subject) -> None:
    """An engine that several threads call at once gives each what it gets alone."""
    engine = subject.engine(encoder())
    cases = [tokens(1 + number % 3, 2 + number % 7) for number in range(_CALLS)]
    alone = [engine.run(case) for case in cases]
    with ThreadPoolExecutor(_THREADS) as pool:
        together = list(pool.map(engine.run, cases))
    demand_budget(subject, encoder(), cases, alone, together, "calls of several threads disturb each other")


def check_derived_targets(subject: Subject) -> None:
    """Targets that it makes of itself are of its class, and run; the last of its arithmetics is itself."""
    backend, cls = subject.backend, type(subject.backend)
    arithmetics, mapped = backend.arithmetics, backend.mapped()
    demand(bool(arithmetics) and arithmetics[-1] == backend, "the last of `arithmetics` is not the target itself")
    for member, target in (
        *(("arithmetics", target) for target in arithmetics),
        ("as_loaders_open()", backend.as_loaders_open()),
        ("mapped()", mapped),
    ):
        demand(target is None or isinstance(target, cls), f"{member} gives {target!r}, not a {cls.__name__}")
    for member in ("rounds", "arithmetic"):
        kind, value = {"rounds": bool, "arithmetic": str}[member], getattr(backend, member)
        demand(isinstance(value, kind), f"{member} is {value!r}, not of type {kind.__name__}")
    if mapped is not None and backend.missing() is None:
        place = subject.folder / "mapped"
        place.mkdir()
        case = tokens(2, 5)
        engine = replace(subject, backend=mapped, folder=place).engine(encoder())
        demand_close(subject, encoder(), [case], [engine.run(case)])


def check_graphs_in_memory(subject: Subject) -> None:
    """A backend that has `load` runs a graph from memory, and leaves it as it is."""
    if not subject.backend.interprets():
        return
    subject.demand_runtime()
    program, case = encoder(), tokens(2, 5)
    with unchanged(program, "load()"):
        engine = subject.backend.load(program.sole()[0])
    demand_close(subject, program, [case], [engine.run(case)])


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


CHECKS: dict[str, Check] = {
    "opening": check_opening,
    "outputs": check_outputs,
    "refusals": check_refusals,
    "components": check_components,
    "decoder": check_decoder,
    "derived-targets": check_derived_targets,
    "graphs-in-memory": check_graphs_in_memory,
    "threads": check_threads,
}
