"""Named pipelines per target, as text: a preset does nothing that could not be written with `--pipeline`."""

from __future__ import annotations

from collections.abc import Mapping

from planish.optimizer.errors import UsageError
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.interfaces import option_text

_SHARED = (
    "fold-constants,eliminate-identities,simplify-shapes,fold-constants,eliminate-identities,simplify-masks,"
    "simplify-shapes,unmerge-batches,unfuse-gemm,fuse-layer-norm,fuse-rms-norm,fuse-gelu,fuse-rotary-embedding,"
    "fuse-attention,share-key-heads,merge-moves,fold-constants,deduplicate-initializers,eliminate-common-subexpressions"
)
"""Cleanup, and raising to canonical operators: the same for every target."""

_TIDY = "fold-constants,deduplicate-initializers"
"""After attention was legalized: masks that turn out to be constant, and numbers that stand there twice."""

_PRODUCTS = f"{_SHARED},unfuse-gemm{{anywhere=true}}"
"""In front of passes that round products: every one in the spelling that they look for."""

_OPENVINO, _TENSORRT = f"legalize-openvino,{_TIDY}", f"legalize-tensorrt,{_TIDY}"

_WEIGHTS = "quantize-weights{bits=4 block=128},quantize-weights{bits=4},quantize-weights"
"""Weights in 4 bits where the budget bears it, with a scale for 128 or for 32 of them, and in 8 bits where that is too
much. A step of a decoder takes as long as its weights take to be read, scales included."""
_SMALL = f"pack-projections,quantize-embeddings,{_WEIGHTS}"
_SMALL_BY_DATA = _SMALL.replace("bits=4", "bits=4 method=gptq")

_LAST = "remove-unused-nodes"

PRESETS: Mapping[str, Mapping[str, str]] = {
    "exact": {
        "onnxruntime": f"{_SHARED},legalize-onnxruntime,share-transposed-weights,{_LAST}",
        "openvino": f"{_SHARED},{_OPENVINO},share-transposed-weights,{_LAST}",
        "tensorrt": f"{_SHARED},{_TENSORRT},{_LAST}",
    },
    "fast": {
        "onnxruntime": f"{_PRODUCTS},pack-projections,quantize-int8{{activations=token}},legalize-onnxruntime,{_LAST}",
        "openvino": f"{_PRODUCTS},quantize-int8{{activations=runtime}},{_OPENVINO},{_LAST}",
        "tensorrt": f"{_SHARED},{_TENSORRT},convert-float16,{_LAST}",
    },
    "small": {
        "onnxruntime": f"{_PRODUCTS},{_SMALL},use-matmul-nbits,legalize-onnxruntime,{_LAST}",
        "openvino": f"{_PRODUCTS},{_SMALL},{_OPENVINO},{_LAST}",
        "tensorrt": f"{_SHARED},{_TENSORRT},convert-float16,{_LAST}",
    },
}
"""Preset -> target -> pipeline. For tensorrt `fast` and `small` compute in float16 where that does not overflow.

`fast` quantizes the head of a language model, so that its embedding has no second copy to share."""

_SMOOTH = "smooth-activations{anywhere=true},split-outliers"
_BY_DATA = "range=average method=gptq correct_bias=true"
_STATIC = f"quantize-int8{{activations=static {_BY_DATA}}}"
_TENSOR_CORES = (
    f"smooth-activations,{_TENSORRT},quantize-int8{{activations=static signed=true {_BY_DATA}}},convert-float16"
)
"""Integers around zero, as tensor cores multiply them; the smoothing is folded into what stands before."""

INFORMED: Mapping[str, Mapping[str, str]] = {
    "fast": {"tensorrt": f"{_PRODUCTS},{_TENSOR_CORES},{_LAST}"},
    "small": {
        "onnxruntime": f"{_PRODUCTS},{_SMALL_BY_DATA},use-matmul-nbits,legalize-onnxruntime,{_LAST}",
        "openvino": f"{_PRODUCTS},{_SMALL_BY_DATA},{_OPENVINO},{_LAST}",
        "tensorrt": f"{_PRODUCTS},{_TENSOR_CORES},{_LAST}",
    },
}
"""What stands for the pipeline of a preset if there are calibration data, where a race would decide nothing: `small` is
not after speed, and for tensorrt nothing is timed."""

CALIBRATED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fast": {
        "onnxruntime": (
            f"{_PRODUCTS},{_SMOOTH},pack-projections,legalize-onnxruntime,{_STATIC},quantize-int8,"
            f"use-matmul-integer-to-float,{_LAST}",
        ),
        "openvino": (f"{_PRODUCTS},{_SMOOTH},{_OPENVINO},{_STATIC},quantize-int8{{activations=runtime}},{_LAST}",),
    },
}
"""What is tried beside the pipeline of a preset if there are calibration data, and kept where that is faster.

Fixed steps come last: whatever moves an activation by a rounding error, exact as it is, can move it by a whole step."""

STEPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fast": {
        "onnxruntime": (f"{_PRODUCTS},pack-projections,{_WEIGHTS},use-matmul-nbits,legalize-onnxruntime,{_LAST}",),
        "openvino": (f"{_PRODUCTS},pack-projections,{_WEIGHTS},{_OPENVINO},{_LAST}",),
    },
}
"""What is tried as well where texts are written token by token, and kept where that is faster."""

EXTRA = "remove-padding"
"""Costs a little for a single text and gains much for padded ones: tried behind the pipeline of a preset, and kept
where that is faster, if the shapes asked for have several texts."""

SPECIALIZE = "specialize-shapes"
"""What every pipeline begins with when sizes are fixed; they are its options."""

BUDGETS: Mapping[str, str] = {"fast": "cosine>=0.99", "small": "cosine>=0.99"}
"""What passes that are not exact may cost when nothing else is asked for."""


def pipeline_text(preset: str, target: str, *, calibrated: bool = False) -> str:
    """The pipeline of a preset for a target named without options; targets of third parties get the shared part."""
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}{option_text.did_you_mean(preset, PRESETS)}")
    informed = INFORMED.get(preset, {}).get(target) if calibrated else None
    return informed or PRESETS[preset].get(target, f"{_SHARED},{_LAST}")


def budget(preset: str | None) -> Budget:
    """The default fidelity of a preset; nothing for an explicit pipeline."""
    default = BUDGETS.get(preset or "")
    return Budget.parse([] if default is None else [default])
