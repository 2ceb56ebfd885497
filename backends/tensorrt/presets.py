"""The presets of TensorRT.

Nothing is timed where an engine is written, so no recipe races: data change the main one. `fast` and `small` are the
same.
"""

from __future__ import annotations

from planish.optimizer.interfaces.recipe import CANONICAL, LAST, Recipe, When

_LEGALIZE = (
    "legalize-tensorrt",
    "fold-constants",  # masks that turn out to be constant
    "deduplicate-initializers",  # numbers that attention, written out, has twice
)
_ROUNDED = (
    Recipe(
        (
            *CANONICAL,
            *_LEGALIZE,
            "convert-float16",
            LAST,
        ),
        why="float16 where it does not overflow",
    ),
    Recipe(
        (
            *CANONICAL,
            "unfuse-gemm{anywhere=true}",  # before passes that round: products in the spelling that they look for
            "smooth-activations",  # folded into what stands before: no Mul is written
            *_LEGALIZE,
            "quantize-int8{activations=static signed=true range=average method=gptq correct_bias=true}",
            "convert-float16",  # behind rounding: a Cast between DequantizeLinear and MatMul would part one kernel
            LAST,
        ),
        When.MAIN_CALIBRATED,
        why="integers around zero, as tensor cores multiply them",
    ),
)

PRESETS = {
    "exact": (
        Recipe(
            (
                *CANONICAL,
                *_LEGALIZE,
                LAST,
            ),
            why="standard operators, which the parser reads",
        ),
    ),
    "fast": _ROUNDED,
    "small": _ROUNDED,
}
"""Preset -> its recipes."""
