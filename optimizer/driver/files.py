"""Files that a build reads, and writes beside its output: their places are checked before anything is lowered."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from planish.optimizer.compilation.options import BuildOptions
from planish.optimizer.errors import BadInput, OutOfResources, UsageError, of_system
from planish.optimizer.fidelity.user_metric import Evaluation
from planish.optimizer.lowering import Lowered
from planish.optimizer.lowering.checkpoint.adapter import FILES
from planish.optimizer.output.depfile import escaped
from planish.optimizer.system.staging import demand_apart, demand_not_read, staged_file


def check_places(source: object, out: Path, options: BuildOptions) -> None:
    """Raise UsageError for files that would be written over each other or over what is read, or that make cannot name;
    BadInput for files that cannot be written."""
    given = {"source": source, "--adapter": options.adapter, "--calibration": options.calibration}
    read = {name: Path(value) if isinstance(value, str | Path) else None for name, value in given.items()}
    outputs = {"--profile": options.profile, "--lock": options.lock, "--depfile": options.depfile}
    written = {name: Path(value) for name, value in outputs.items() if value is not None}
    demand_apart(out, read, written)
    for first, second in itertools.combinations(written.items(), 2):
        demand_not_read(dict([first]), dict([second]))
    for name, path in written.items():
        demand_writable(path, f"{name} {path}", replaced=name == "--depfile")
        for other in (out, *written.values()):
            if Path(os.path.realpath(path)) in Path(os.path.realpath(other)).parents:
                raise UsageError(f"{other} cannot lie below this, which is a file", where=f"{name} {path}")
    if options.depfile is not None:
        # Names of the source's files are checked when they are known, behind lowering.
        for place in (*read.values(), out, *written.values()):
            escaped(place or Path())


def demand_writable(path: Path, where: str, *, replaced: bool) -> None:
    """Raise BadInput if a file cannot be written at ``path``, whose missing folders are created when it is written.

    A file that exists is only read unless it is ``replaced``. OutOfResources if the disk is full.
    """
    folder = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    if not folder.is_dir():
        raise BadInput(f"this cannot be written: {folder} is not a folder", where=where, advice="choose another place")
    if path.is_dir():
        raise BadInput("this is a folder", where=where, advice="name the file that shall be written")
    if path.is_file() and not replaced:
        return
    try:
        # Permissions do not tell everything: a file system may be read-only, or take no files.
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        clear = of_system(error)
        if isinstance(clear, OutOfResources):
            raise clear from error
        raise BadInput(
            f"this cannot be written: {folder} takes no files ({error.strerror})",
            where=where,
            advice="choose another place",
        ) from error


def written_beside(options: BuildOptions) -> list[Path]:
    """The files beside the output that this build writes or extends, to be asked for before it does."""
    lock = [] if options.lock is None or Path(options.lock).is_file() else [Path(options.lock)]
    return lock + ([] if options.profile is None else [Path(options.profile)])


def files_read(source: object, names: Iterable[str], options: BuildOptions) -> list[Path]:
    """The files that a build has read, of which ``names`` lie in the source's folder or in the adapter's."""
    adapter = None if options.adapter is None else Path(options.adapter)
    place = Path(source) if isinstance(source, str | Path) else Path()  # a module has no files
    folder = place if place.is_dir() else place.parent
    paths = [adapter / name if adapter is not None and name in FILES else folder / name for name in names]
    paths += [Path(given) for given in (options.calibration, options.profile) if isinstance(given, str | Path)]
    paths += [Path(word) for word in (Evaluation.parse(options.evaluate).words if options.evaluate else ())]
    return [path for path in paths if path.is_file()]


def check_depfile(source: object, options: BuildOptions, lowered: Lowered) -> None:
    """UsageError if the depfile would be written over a file of the source, or cannot name one of them."""
    if options.depfile is None:
        return
    inputs = files_read(source, lowered.program.provenance.files, options)
    demand_not_read({str(path): path for path in inputs}, {"--depfile": Path(options.depfile)})
    for path in inputs:
        escaped(path)
    inputs += [] if options.lock is None else [Path(options.lock)]
    if inputs and all("=" in str(path) for path in inputs):
        raise UsageError("a depfile cannot begin with a name that has '='", where=f"--depfile {options.depfile}")


@contextmanager
def staged_if_given(path: str | Path | None) -> Iterator[Path | None]:
    """A place for a file that moves to ``path`` if the block succeeds; None without a path."""
    if path is None:
        yield None
        return
    with staged_file(Path(path)) as place:
        yield place
