"""Checks of what a backend writes: its files, the passes that they need, and endings by which they are opened."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from planish.optimizer.errors import BadInput, CheckFailed, UsageError
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.backend import Backend, RequiredPass
from planish.optimizer.ir.program import Program
from planish.optimizer.testing.comparison import demand_close
from planish.optimizer.testing.programs import decoder, encoder, tokens
from planish.optimizer.testing.subject import Check, Subject, demand


def check_emission(subject: Subject) -> None:
    """`emit` writes the file that `open` reads, and the same bytes each time, which name no place; all into its
    folder."""
    program, names = encoder(), ("one", "another")
    here = _names_in(Path.cwd())
    places = [subject.emitted(program, name) for name in names]
    strays = sorted((_names_in(subject.folder) - {*names}) | (_names_in(Path.cwd()) - here))
    demand(not strays, f"emit() writes outside of the folder that it is given: {', '.join(strays)}")
    file = places[0] / subject.backend.model_file
    demand(file.is_file(), f"emit() writes no {subject.backend.model_file}, which model_file names")
    first, second = map(_files_in, places)
    demand(first.keys() == second.keys(), f"two emissions write other files: {sorted(first)} and {sorted(second)}")
    for name, content in first.items():
        demand(content == second[name], f"two emissions write other bytes into {name}")
        demand(str(subject.folder).encode() not in content, f"{name} names the folder that it was written to")


def _names_in(folder: Path) -> set[str]:
    # Hidden ones are caches of tools, which may come and go beside us.
    return {path.name for path in folder.iterdir() if not path.name.startswith((".", "__pycache__"))}


def _files_in(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def check_suffixes(subject: Subject) -> None:
    """Single files with its endings are opened and run: one that it writes, an ONNX file, or its own file renamed."""
    if not subject.backend.suffixes:
        return
    subject.demand_runtime()
    place, case = subject.emitted(encoder()), tokens(2, 5)
    for suffix in subject.backend.suffixes:
        file = _file_with(suffix, place, subject.backend.model_file)
        try:
            engine = subject.opened(file)
        except BadInput as error:
            raise CheckFailed(
                f"suffixes has {suffix}, and open() refuses {file.name}: {error.what}",
                advice="leave it out; if it is for files of other programs, leave out this check: "
                "without={'suffixes': 'the reason'}",
            ) from error
        demand_close(subject, encoder(), [case], [engine.run(case)])


def _file_with(suffix: str, place: Path, model_file: str) -> Path:
    """A file with an engine of the encoder and this ending, in the folder of an engine."""
    written = sorted(place.rglob(f"*{suffix}"), key=lambda path: path.name != model_file)
    if written:
        return written[0]
    file = place / f"single{suffix}"
    if suffix == ".onnx":
        ir.save(encoder().sole()[0], file)
    else:
        shutil.copy(place / model_file, file)
    return file


def check_required_passes(subject: Subject) -> None:
    """Passes that its options require can be made, and `emit` writes what `with_required_passes` returns."""
    if type(subject.backend).required_passes is Backend.required_passes:
        return
    for number, target in enumerate(_with_each_option(subject.backend)):
        for required in target.required_passes:
            _demand_pass(target, required)
        if target.required_passes:
            place = subject.folder / str(number)
            place.mkdir()
            _demand_use(replace(subject, backend=target, folder=place))


def _with_each_option(backend: Backend) -> Iterator[Backend]:
    """The target, and with each value of each option that has a few."""
    yield backend
    for option, facts in option_text.schema(type(backend)).items():
        values = facts.get("enum", (False, True) if facts.get("type") == "boolean" else ())
        yield from (replace(backend, **{option: value}) for value in values if value != getattr(backend, option))


def _demand_pass(target: Backend, required: object) -> None:
    """CheckFailed if a required pass cannot be made of its text."""
    if not isinstance(required, RequiredPass):
        raise CheckFailed(f"required_passes of {target} has {required!r}, which is no RequiredPass")
    place = f"required pass {required.text!r} of {target}"
    demand(isinstance(required.text, str), f"{place}: it is not text")
    try:
        spec = option_text.parse_one(required.text, what="pass")
        registry.pass_class(spec.name).from_options(spec.options)
    except UsageError as error:
        raise CheckFailed(f"{place}: {error}", picture=error.picture) from error


def _demand_use(subject: Subject) -> None:
    """CheckFailed if `emit` ignores what `with_required_passes` returns.

    It is made to return another program: `emit` must write that one, whatever it is given.
    """
    for name, make in (("encoder", encoder), ("decoder", decoder)):
        another = _with_other_weights(make())
        probe = replace(subject, backend=_requiring(subject.backend, another))
        try:
            written, wanted = probe.emitted(make(), f"{name}-given"), probe.emitted(another, f"{name}-returned")
        except CheckFailed:  # a target may refuse programs with a cache, or without
            continue
        demand(
            _files_in(written) == _files_in(wanted),
            f"emit() of {subject.backend} ignores its required_passes",
            "begin it with `program = self.with_required_passes(program)`",
        )


def _requiring(backend: Backend, program: Program) -> Backend:
    """A copy of a target whose `with_required_passes` returns ``program``."""
    members = {"__slots__": (), "__doc__": type(backend).__doc__, "with_required_passes": lambda *_: program}
    probe = copy.copy(backend)
    # `replace` would make an instance of the class itself; targets are frozen.
    object.__setattr__(probe, "__class__", type(type(backend).__name__, (type(backend),), members))
    return probe


def _with_other_weights(program: Program) -> Program:
    """The program with twice its table of embeddings."""
    model, _ = program.sole()
    table = model.graph.initializers["table"]
    if table.const_value is None:
        raise ValueError("the table of a program has no entries")
    table.const_value = ir.tensor(table.const_value.numpy() * 2, name=table.name)
    return program


CHECKS: dict[str, Check] = {
    "emission": check_emission,
    "required-passes": check_required_passes,
    "suffixes": check_suffixes,
}
