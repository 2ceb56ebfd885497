"""Presets: which recipes of a target's backend are tried, and how close their engines must stay.

The recipes are the backends' own (`backends/*/presets.py`); here stands what holds for every target, those without
recipes included.
"""

from __future__ import annotations

from collections.abc import Mapping

from planish.optimizer.errors import UsageError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.recipe import CANONICAL, LAST, Recipe, When

PRESETS = ("exact", "fast", "small")

BUDGETS: Mapping[str, str] = {"fast": "cosine>=0.99", "small": "cosine>=0.99"}
"""The accuracy budget of a preset where `--keep` gives none."""

SHARED = (
    Recipe((*CANONICAL, LAST), why="for targets whose backend brings no recipe of its own"),
    Recipe(
        ("remove-padding",),
        When.PADDED,
        why="it costs a little for a single text and gains much for padded ones",
    ),
)
"""The recipes that every preset has for every target, unless its backend has another for the same case."""

SPECIALIZE = "specialize-shapes"
"""The first pass of every pipeline where sizes are fixed; they are its options."""


def recipes(preset: str, target: str, when: When) -> tuple[Recipe, ...]:
    """Recipes of a preset in one case, for a target named without options; UsageError if there is no such preset."""
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}{option_text.did_you_mean(preset, PRESETS)}")
    known = target in registry.table(registry.BACKENDS)
    own = registry.backend_class(target).presets.get(preset, ()) if known else ()
    return tuple(recipe for recipe in own if recipe.when is when) or tuple(
        recipe for recipe in SHARED if recipe.when is when
    )


def pipeline_text(preset: str, target: str, *, calibrated: bool = False) -> str:
    """The pipeline of a preset for a target named without options; targets without recipes get the shared part."""
    informed = recipes(preset, target, When.MAIN_CALIBRATED) if calibrated else ()
    return str((informed or recipes(preset, target, When.MAIN))[0])


def budget(preset: str | None) -> Budget:
    """The default fidelity of a preset; nothing for an explicit pipeline."""
    default = BUDGETS.get(preset or "")
    return Budget.parse([] if default is None else [default])
