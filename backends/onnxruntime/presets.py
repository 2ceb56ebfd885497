"""The presets of ONNX Runtime."""

from __future__ import annotations

from planish.optimizer.interfaces.recipe import CANONICAL, LAST, Recipe, When

_PRODUCTS = (
    *CANONICAL,
    "unfuse-gemm{anywhere=true}",  # before passes that round: products in the spelling that they look for
)

PRESETS = {
    "exact": (
        Recipe(
            (
                *CANONICAL,
                "legalize-onnxruntime",
                "share-transposed-weights",
                LAST,
            ),
            why="the forms that its kernels run fastest",
        ),
    ),
    "fast": (
        Recipe(
            (
                *_PRODUCTS,
                "pack-projections",  # before rounding: an activation is rounded once for its projections
                "quantize-int8{activations=token}",  # heads as well: there is no second copy of an embedding to share
                "legalize-onnxruntime",
                LAST,
            ),
            why="a scale for each token as it comes: no data are needed, and rows do not influence each other",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "smooth-activations{anywhere=true}",
                "split-outliers",  # behind smoothing, which leaves it fewer to split
                "pack-projections",
                "legalize-onnxruntime",
                # Fixed steps come last: what moves an activation by a rounding error, exact as it is, can move it
                # by a whole step.
                "quantize-int8{activations=static range=average method=gptq correct_bias=true}",
                "quantize-int8",  # what the budget does not bear in fixed steps
                "use-matmul-integer-to-float",  # reads the Q and DQ of fixed steps
                LAST,
            ),
            When.CALIBRATED,
            why="fixed steps run faster than steps found anew for each token",
        ),
        Recipe(
            (
                *_PRODUCTS,
                "pack-projections",
                "quantize-weights{bits=4 block=128}",
                "quantize-weights{bits=4}",  # where the budget bears a scale for 32 weights, and not for 128
                "quantize-weights",  # where 4 bits are too few
                "use-matmul-nbits",
                "legalize-onnxruntime",
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
                "use-matmul-nbits",
                "legalize-onnxruntime",
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
                "use-matmul-nbits",
                "legalize-onnxruntime",
                LAST,
            ),
            When.MAIN_CALIBRATED,
            why="data let more products bear 4 bits at the same size and speed: a race would decide nothing",
        ),
    ),
}
"""Preset -> its recipes."""
