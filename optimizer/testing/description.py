"""Checks of what a backend says of itself: names, options, presets, and a runtime that is not here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from packaging.requirements import Requirement

from planish.optimizer.errors import CheckFailed, MissingRuntime, UsageError
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.recipe import When
from planish.optimizer.pipeline import presets
from planish.optimizer.pipeline.pipeline import Pipeline
from planish.optimizer.testing.programs import encoder
from planish.optimizer.testing.subject import Check, NotApplicable, Subject, demand


def check_names(subject: Subject) -> None:
    """It is registered under its own name, and says which distribution brings its runtime."""
    cls = type(subject.backend)
    for member in ("name", "distribution", "model_file"):
        demand(bool(getattr(cls, member, None)), f"{cls.__name__}.{member} is missing or empty")
    entry = registry.table(registry.BACKENDS).get(cls.name)
    demand(
        entry is not None and entry.load() is cls,
        f"no entry point of the group {registry.BACKENDS} leads from {cls.name!r} to {cls.__name__}",
        "name a table in pyproject.toml, and install the distribution again",
    )
    wrong = [suffix for suffix in cls.suffixes if not suffix.startswith(".")]
    demand(not wrong, f"suffixes begin with a point, {wrong} do not")


def check_options(subject: Subject) -> None:
    """Each option has a default and a description, and the text form gives an equal target."""
    backend, cls = subject.backend, type(subject.backend)
    parameters = vars(cls).get("__dataclass_params__")  # of the class itself: those of its base say nothing
    demand(parameters is not None and parameters.frozen, f"{cls.__name__} is not a frozen dataclass")
    for option, facts in option_text.schema(cls).items():
        demand(bool(facts.get("description")), f"option {option} has no docstring beneath it")
        demand("default" in facts, f"option {option} has no default", "a target can be named without options")
    parsed = option_text.parse_one(str(backend), what="target")
    demand(cls.from_options(parsed.options) == backend, f"{backend} does not give an equal target when it is parsed")
    try:
        cls.from_options({"no_such_option": "1"})
    except UsageError:
        return
    raise CheckFailed("an unknown option is not refused")


def check_presets(subject: Subject) -> None:
    """Its recipes are for presets that there are, can be parsed, and say why each is tried; `exact` is exact."""
    for preset, recipes in subject.backend.presets.items():
        demand(preset in presets.PRESETS, f"there is no preset {preset!r}", f"there are: {', '.join(presets.PRESETS)}")
        main = [recipe for recipe in recipes if recipe.when is When.MAIN]
        demand(len(main) == 1, f"preset {preset} has {len(main)} recipes that are always tried, not one")
        informed = [recipe for recipe in recipes if recipe.when is When.MAIN_CALIBRATED]
        demand(len(informed) <= 1, f"preset {preset} has {len(informed)} main recipes for calibration data")
        for recipe in recipes:
            demand(bool(recipe.why), f"preset {preset} does not say why {recipe} is tried")
            passes = Pipeline.parse(str(recipe)).passes
            inexact = [str(step) for step in passes if not step.exact]
            demand(preset != "exact" or not inexact, f"preset exact has passes that are not: {', '.join(inexact)}")


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
    "options": check_options,
    "presets": check_presets,
    "missing-runtime": check_missing_runtime,
}
