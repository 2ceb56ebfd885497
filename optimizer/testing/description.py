"""Checks of what a backend says of itself: names, options, presets, and a runtime that is not here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PureWindowsPath

from packaging.requirements import Requirement

from planish.optimizer.errors import CheckFailed, MissingRuntime, UsageError
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.interfaces.pass_base import Pass
from planish.optimizer.interfaces.recipe import Recipe, When
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.pipeline import Pipeline
from planish.optimizer.testing.programs import encoder
from planish.optimizer.testing.subject import Check, NotApplicable, Subject, demand


def check_names(subject: Subject) -> None:
    """It is registered under its own name, and says which distributions bring its runtime."""
    cls = type(subject.backend)
    for member in ("name", "distribution", "model_file"):
        demand(bool(getattr(cls, member, None)), f"{cls.__name__}.{member} is missing or empty")
    _demand_members(cls)
    entry = registry.table(registry.BACKENDS).get(cls.name)
    if entry is not None and entry.fault is not None:
        raise CheckFailed(entry.fault.what, advice="mend it, and install the distribution again")
    demand(
        entry is not None and entry.load() is cls,
        f"no entry point of the group {registry.BACKENDS} leads from {cls.name!r} to {cls.__name__}",
        "name a table in pyproject.toml, and install the distribution again",
    )
    reason = cls.missing()
    demand(
        reason is None or (isinstance(reason, str) and len(reason.splitlines()) == 1),
        f"missing() gives {reason!r}, neither None nor one line",
    )
    absent = [library for library in cls.libraries if reason is None and not _is_installed(library)]
    demand(
        not absent,
        f"libraries names {', '.join(absent)}, which is not installed though missing() says that nothing is missing",
        "name distributions as `pip list` does, not modules",
    )


def _demand_members(cls: type[Backend]) -> None:
    """CheckFailed if a class member that every backend has is missing or of another type."""
    fault = option_text.member_fault(cls)
    demand(fault is None, str(fault))


def _is_installed(distribution: str) -> bool:
    """True if a distribution, or another build of it (`onnxruntime-gpu`), is here."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return any(str(found.name).startswith(f"{distribution}-") for found in metadata.distributions())
    return True


def check_files(subject: Subject) -> None:
    """Each component has a file of its own, and files with its endings are found by them."""
    backend, cls = subject.backend, type(subject.backend)
    _demand_members(cls)
    files = {component: backend.file_of(component) for component in ("model", "encoder_model", "decoder_model")}
    for name in (cls.model_file, *files.values()):
        demand(
            isinstance(name, str) and PureWindowsPath(name).name == name,
            f"{name!r} is not the name of a file in an engine folder",
            "engine folders have no folders in them that planish reads",
        )
    demand(files["model"] == cls.model_file, f"file_of('model') gives {files['model']!r}, not model_file")
    demand(
        len({*files.values()}) == len(files),
        f"file_of gives one file for different components: {', '.join(files.values())}",
        "put `model` into model_file, which file_of replaces by the name of the component",
    )
    wrong = [suffix for suffix in cls.suffixes if not suffix.startswith(".")]
    demand(not wrong, f"suffixes begin with a point, {wrong} do not")
    for suffix in cls.suffixes:
        found = Path(f"file{suffix}").suffix
        demand(found == suffix, f"no file has the suffix {suffix!r}: that of `file{suffix}` is {found!r}")
        others = [other.name for other in registry.backends() if other is not cls and suffix in other.suffixes]
        demand(not others, f"files with the suffix {suffix} are opened by target {', '.join(others)}", "leave it out")


def check_options(subject: Subject) -> None:
    """Each option has a default and a description, and the text form gives an equal target."""
    backend, cls = subject.backend, type(subject.backend)
    fault = option_text.options_fault(cls)
    demand(fault is None, str(fault))
    parsed = option_text.parse_one(str(backend), what="target")
    demand(cls.from_options(parsed.options) == backend, f"{backend} does not give an equal target when it is parsed")
    try:
        cls.from_options({"no_such_option": "1"})
    except UsageError:
        return
    raise CheckFailed("an unknown option is not refused")


def check_presets(subject: Subject) -> None:
    """Its recipes are for presets that there are, can be parsed, and say why each is tried; `exact` is exact."""
    _demand_members(type(subject.backend))
    for preset, recipes in subject.backend.presets.items():
        demand(preset in presets.PRESETS, f"there is no preset {preset!r}", f"there are: {', '.join(presets.PRESETS)}")
        main = [recipe for recipe in recipes if recipe.when is When.MAIN]
        demand(len(main) == 1, f"preset {preset} has {len(main)} recipes that are always tried, not one")
        informed = [recipe for recipe in recipes if recipe.when is When.MAIN_CALIBRATED]
        demand(len(informed) <= 1, f"preset {preset} has {len(informed)} main recipes for calibration data")
        for number, recipe in enumerate(recipes, start=1):
            passes = _passes_of(recipe, f"recipe {number} of preset {preset}")
            demand(bool(recipe.why), f"preset {preset} does not say why {recipe} is tried")
            inexact = [str(step) for step in passes if not step.exact]
            demand(preset != "exact" or not inexact, f"preset exact has passes that are not: {', '.join(inexact)}")


def _passes_of(recipe: Recipe, place: str) -> tuple[Pass, ...]:
    """The passes of a recipe; CheckFailed names its place if they cannot be read."""
    passes: object = recipe.passes  # nothing checks the type that it is declared with
    demand(
        isinstance(passes, tuple) and all(isinstance(text, str) for text in passes),
        f"{place} has the passes {passes!r}, which is not a tuple of texts",
        "write a comma behind a single one: ('fold-constants',)",
    )
    demand(isinstance(recipe.when, When), f"{place} is tried when {recipe.when!r}, which is no When")
    try:
        return Pipeline.parse(str(recipe)).passes
    except UsageError as error:
        raise CheckFailed(f"{place}: {error}", picture=error.picture) from error


def check_missing_runtime(subject: Subject) -> None:
    """Without its runtime it says in one line how to install it, and opens nothing."""
    backend = subject.backend
    place = subject.emitted(encoder()) if backend.missing() is None else subject.folder
    with _hidden(backend.distribution):
        reason = backend.missing()
        demand(reason is not None, f"without {backend.distribution}, missing() says that nothing is missing")
        demand("install" in (reason or ""), f"missing() does not say how to install: {reason}")
        demand("\n" not in (reason or ""), "missing() says it in several lines")
        try:
            backend.open(place)
        except MissingRuntime:
            return
    raise CheckFailed("open() does not raise MissingRuntime where the runtime is missing")


@contextmanager
def _hidden(distribution: str) -> Iterator[None]:
    """Block the import of a distribution's modules, as where it is not installed."""
    needed = [Requirement(text) for text in metadata.requires("planish") or []]
    if any(one.name == distribution and (one.marker is None or one.marker.evaluate({"extra": ""})) for one in needed):
        raise NotApplicable(f"planish itself needs {distribution}: it is always there")
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:  # nothing to hide
        files = []
    tops = {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}
    kept = {name: sys.modules.get(name) for name in tops if name.isidentifier()}
    sys.modules.update(dict.fromkeys(kept))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


CHECKS: dict[str, Check] = {
    "names": check_names,
    "files": check_files,
    "options": check_options,
    "presets": check_presets,
    "missing-runtime": check_missing_runtime,
}
