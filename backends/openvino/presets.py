"""The presets of OpenVINO."""

from __future__ import annotations

from planish.optimizer.interfaces.recipe import CANONICAL, LAST, Recipe, When

_PRODUCTS = (
    *CANONICAL,
    "unfuse-gemm{anywhere=true}",  # before passes that round: products in the spelling that they look for
)
_LEGALIZE = (
    "legalize-openvino",
    "fold-constants",  # masks that turn out to be constant
    "deduplicate-initializers",  # numbers that attention, written out, has twice
)

PRESETS = {
    "exact": (
        Recipe(
            (
                *CANONICAL,
                *_LEGALIZE,
                "share-transposed-weights",
                LAST,
            ),
            why="the forms that its CPU plugin runs fastest",
        ),
    ),
    "fast": (
        Recipe(
            (
                *_PRODUCTS,
                "quantize-int8{activations=runtime}",  # heads as well: there is no second copy of an embedding to share
                "group-activations{size=64}",
                *_LEGALIZE,
                LAST,
            ),
            why="the runtime rounds activations by itself, in front of products whose weights are stored in 8 bits",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "quantize-int8{activations=runtime}",
                "group-activations",
                *_LEGALIZE,
                LAST,
            ),
            When.ALTERNATIVE,
            why="the runtime rounds activations faster in groups of 128 than of 64, and less closely",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "smooth-activations{anywhere=true}",
                "split-outliers",  # behind smoothing, which leaves it fewer to split
                *_LEGALIZE,
                # Fixed steps come last: what moves an activation by a rounding error, exact as it is, can move it
                # by a whole step.
                "quantize-int8{activations=static range=average method=gptq correct_bias=true}",
                "quantize-int8{activations=runtime}",  # what the budget does not bear in fixed steps
                LAST,
            ),
            When.CALIBRATED,
            why="fixed steps run faster than steps found anew",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "smooth-activations{anywhere=true}",
                *_LEGALIZE,
                "quantize-int8{activations=static range=average method=gptq correct_bias=true}",
                "quantize-int8{activations=runtime}",
                LAST,
            ),
            When.CALIBRATED,
            why="outliers that stay in their product are rounded with it, and cost no product of their own",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "pack-projections",
                "quantize-weights{bits=4 block=128}",
                "quantize-weights{bits=4}",  # where the budget bears a scale for 32 weights, and not for 128
                "quantize-weights",  # where 4 bits are too few
                "group-activations",  # as large as the blocks of weights
                *_LEGALIZE,
                LAST,
            ),
            When.GENERATING,
            why="a step of a decoder takes as long as its weights take to be read, scales included",
        ),
    ),
    "small": (
        Recipe(
            (
                *_PRODUCTS,
                "pack-projections",
                "quantize-embeddings",
                "quantize-weights{bits=4 block=128}",
                "quantize-weights{bits=4}",
                "quantize-weights",
                "group-activations",
                *_LEGALIZE,
                LAST,
            ),
            why="weights in 4 bits where the budget bears it, in 8 where that is too much",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "pack-projections",
                "quantize-embeddings",
                "quantize-weights{bits=4 method=gptq block=128}",
                "quantize-weights{bits=4 method=gptq}",
                "quantize-weights",
                "group-activations",
                *_LEGALIZE,
                LAST,
            ),
            When.MAIN_CALIBRATED,
            why="data let more products bear 4 bits at the same size and speed: a race would decide nothing",
        ),
    ),
}
"""Preset -> its recipes."""
