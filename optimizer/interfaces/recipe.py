"""Recipes: the pipelines that a preset tries for a target, when it tries each, and why.

A backend brings its own (`Backend.presets`). Each is a pipeline that could be given as text with `--pipeline`, written
one pass a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class When(Enum):
    """When a recipe of a preset is tried."""

    MAIN = auto()
    """Always: the pipeline of the preset."""
    MAIN_CALIBRATED = auto()
    """In place of `MAIN` if there are calibration data, without a race: for what no clock decides."""
    ALTERNATIVE = auto()
    """Beside the main pipeline, and kept where it is faster."""
    CALIBRATED = auto()
    """Beside the main pipeline if there are calibration data, and kept where it is faster."""
    GENERATING = auto()
    """Beside the main pipeline if the program generates token by token, and kept where it is faster."""
    PADDED = auto()
    """Behind each of the others if the shapes asked for have several texts, and kept where it is faster."""


@dataclass(frozen=True)
class Recipe:
    """One pipeline of a preset."""

    passes: tuple[str, ...]
    """Each as text, with its options: `quantize-int8{activations=token}`."""
    when: When = When.MAIN
    why: str = ""
    """The reason for trying it, for readers of the source."""

    def __str__(self) -> str:
        """The pipeline as text."""
        return ",".join(self.passes)


CANONICAL = (
    "fold-constants",
    "eliminate-identities",
    "simplify-shapes",
    "fold-constants",  # what the shapes above made constant
    "eliminate-identities",
    "simplify-masks",
    "simplify-shapes",  # what only masks had read of shapes
    "unmerge-batches",
    "unfuse-gemm",  # before whatever looks for products: they are MatMul and Add from here on
    "fuse-layer-norm",
    "fuse-rms-norm",
    "fuse-gelu",
    "fuse-rotary-embedding",
    "fuse-attention",
    "share-key-heads",  # behind it: heads are shared by the operator Attention
    "merge-moves",
    "fold-constants",
    "deduplicate-initializers",
    "eliminate-common-subexpressions",
)
"""Cleanup, and raising to canonical operators: what recipes of every target begin with."""

LAST = "remove-unused-nodes"
"""Last passes of recipes for every target: they remove unused nodes that other passes left."""
