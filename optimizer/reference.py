"""Reference inputs and outputs: what every engine is held against.

Inputs are made from the signature (several lengths, a padded batch, batch 1, the longest length) or given. Outputs come
from the original model. How precisely the original knows them itself, its noise floor, is estimated on the short cases
by computing them in double precision as well; tolerances of exact rewrites follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planish.optimizer.compare import Budget, Case, Clause, compare
from planish.optimizer.errors import BadInput
from planish.optimizer.program import Role, Signature, TensorSpec

NOISE_FACTOR = 64.0
"""An exact rewrite may move an output by this many noise floors: another order of summation in every layer, in a
runtime with other kernels, on inputs that the floor was not measured on."""
NOISE_MINIMUM = 2.0**-22
"""No floor is taken to be below this relative value (two units in the last place of float32)."""
_LONGEST = 1024
"""Reference inputs are not made longer than this, whatever the model allows."""
_QUICK = 2
_SHARE = 0.75
"""The second row of the padded batch is this share of the first, the third this share of the second, …"""
_ELEMENTS = 1 << 24
"""Outputs with more elements than this are kept in part."""


@dataclass(frozen=True)
class Reference:
    """Cases, the outputs of the original for them, and its noise floor by output."""

    inputs: tuple[Case, ...]
    outputs: tuple[Case, ...]
    noise: Mapping[str, float]
    """Largest relative difference between the original in float32 and in double precision."""
    origin: str
    """How the outputs were made."""

    def exact_budget(self) -> Budget:
        """What an exact rewrite may change: a multiple of the largest noise floor."""
        floor = max([*self.noise.values(), NOISE_MINIMUM])
        return Budget((Clause("max_rel", "<=", float(f"{NOISE_FACTOR * floor:.2e}")),))

    def save(self, folder: Path) -> None:
        """Write `inputs.safetensors` and `outputs.safetensors`."""
        save_cases(self.inputs, folder / "inputs.safetensors")
        save_cases(self.outputs, folder / "outputs.safetensors")

    @classmethod
    def load(cls, folder: Path, noise: Mapping[str, float], origin: str) -> Reference:
        """Read what `save` wrote; BadInput if it is not there or broken."""
        inputs, outputs = (tuple(load_cases(folder / f"{kind}.safetensors")) for kind in ("inputs", "outputs"))
        return cls(inputs, outputs, noise, origin)


def save_cases(cases: Sequence[Case], path: Path) -> None:
    """Write cases as one safetensors file; tensors are called `<case>/<name>`."""
    from safetensors.numpy import save_file

    flat = {f"{index}/{name}": np.ascontiguousarray(a) for index, case in enumerate(cases) for name, a in case.items()}
    save_file(flat, path)


def load_cases(path: Path) -> list[dict[str, np.ndarray]]:
    """Read cases back; BadInput if the file is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"these cases cannot be read ({error})", where=path) from error
    cases: dict[int, dict[str, np.ndarray]] = {}
    for key, array in flat.items():
        index, _, name = key.partition("/")
        cases.setdefault(int(index), {})[name] = array
    return [cases[index] for index in sorted(cases)]


def make_inputs(signature: Signature, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Cases from the signature alone: short, medium, a padded batch, the longest; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return [make_case(signature, sizes, generator) for sizes in case_sizes(signature)]


def case_sizes(signature: Signature) -> list[dict[str, int]]:
    """Sizes of the axes in each case; the longest comes last."""
    axes = list(signature.axes.values())
    if not axes:
        return [{}]
    running = [axis for axis in axes if axis.name != leading_axis(signature)]
    plans = [(3, 20), (1, 2), (1, 64), (1, _LONGEST)]
    return [
        {axis.name: axis.clamp(length if axis in running else count) for axis in axes}
        for count, length in plans
        if running or length < 64
    ]


def leading_axis(signature: Signature) -> str | None:
    """The name of the axis that counts independent examples: the first of the first input."""
    first = signature.inputs[0].shape if signature.inputs else ()
    return first[0] if len(first) > 1 and isinstance(first[0], str) else None


def make_case(signature: Signature, sizes: Mapping[str, int], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """One case of the given sizes: values by role, padding where the mask says so."""
    made = {tensor.name: _values(tensor, signature.shape_of(tensor, sizes), generator) for tensor in signature.inputs}
    mask = signature.mask()
    if mask is not None:
        padding = made[mask.name] == 0
        for tensor in signature.inputs:
            if tensor.role in (Role.TOKENS, Role.SEGMENTS) and made[tensor.name].shape == padding.shape:
                made[tensor.name][padding] = tensor.pad
    return made


def _values(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    dtype = tensor.numpy_dtype()
    if tensor.role is Role.MASK:
        return _mask(shape).astype(dtype)
    if tensor.role is Role.POSITIONS:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if tensor.role is Role.SEGMENTS:
        return np.broadcast_to(np.arange(shape[-1]) * 2 >= shape[-1], shape).astype(dtype)
    if tensor.role is Role.BOXES:
        corners = generator.integers(0, max(tensor.bound or 1, 1), (*shape[:-1], 2, 2))
        return np.sort(corners, axis=-2).reshape(shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return _tokens(tensor, shape, generator).astype(dtype)
    if dtype == np.bool_:
        return generator.random(shape) < 0.5
    return generator.standard_normal(shape).astype(dtype)


def _tokens(tensor: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Ids below the bound, the padding id left out where there are others."""
    bound = tensor.bound or 2
    ids = generator.integers(0, bound, shape)
    return np.asarray(np.where(ids == tensor.pad, (ids + 1) % bound, ids))


def _mask(shape: tuple[int, ...]) -> np.ndarray:
    """Ones; in a batch, each row is padded on the right to a share of the row before it."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    lengths = np.maximum(1, np.ceil(shape[-1] * _SHARE ** np.arange(rows))).astype(np.int64)
    return np.asarray(np.arange(shape[-1]) < lengths[:, None]).reshape(shape)


def quick(inputs: Sequence[Case]) -> list[Case]:
    """The few small cases that passes are checked with one by one, padding among them where there is any."""
    small = sorted(inputs, key=lambda case: sum(array.size for array in case.values()))
    return small[:_QUICK]


def noise_floor(
    signature: Signature, inputs: Sequence[Case], outputs: Sequence[Case], precise: Sequence[Case] | None
) -> dict[str, float]:
    """Relative difference of each output from its more precise self; the minimum where there is none to compare."""
    names = [tensor.name for tensor in signature.outputs]
    if precise is None:
        return dict.fromkeys(names, 8 * NOISE_MINIMUM)
    found = compare(signature, inputs, precise, outputs).outputs
    return {name: max(float(f"{found[name]['max_rel']:.2e}"), NOISE_MINIMUM) for name in names}


def thin(outputs: Case) -> dict[str, np.ndarray]:
    """Outputs, of which huge ones (scores over a large vocabulary) keep evenly spaced entries of the last axis.

    The same output of reference and engine is thinned alike, so the two stay comparable.
    """
    return {
        name: array[..., :: -(-array.size // _ELEMENTS)] if array.ndim and array.size > _ELEMENTS else array
        for name, array in outputs.items()
    }
