"""The program that is compiled: graphs, and the roles of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import onnx_ir as ir


class Role(StrEnum):
    """Role of an input or output of a component; it determines how inputs are generated and outputs compared."""

    TOKENS = "tokens"
    """Integer ids, each below the tensor's ``bound``."""
    MASK = "mask"
    """1 for a token, 0 for padding."""
    SEGMENTS = "segments"
    """Small integers that distinguish sentence A from sentence B, each below ``bound``."""
    POSITIONS = "positions"
    """0, 1, 2, … along the sequence."""
    BOXES = "boxes"
    """Four coordinates (x0 ≤ x1, y0 ≤ y1) of each token on its page, each below ``bound``."""
    PIXELS = "pixels"
    """Images from a checkpoint's processor, (batch, channels, height, width), normalized to about zero mean, unit
    variance."""
    FEATURES = "features"
    """Spectrograms of a recording, (batch, bins, frames), padded at the end with their lowest value."""
    VALUES = "values"
    """Real numbers without a special role."""
    CACHE = "cache"
    """Keys or values of past tokens, (batch, heads, past, size)."""
    HIDDEN = "hidden"
    """Hidden states: vectors along the last axis."""
    LOGITS = "logits"
    """Logits: the arg max along the last axis is the prediction."""


SIGNALS = frozenset({Role.PIXELS, Role.FEATURES})
"""Roles of images and spectrograms: real numbers from a processor, in place of tokens."""
_ROLES_BY_NAME = (
    ("past_key_values", Role.CACHE),
    ("present.", Role.CACHE),
    ("mask", Role.MASK),
    ("token_type", Role.SEGMENTS),
    ("segment", Role.SEGMENTS),
    ("position", Role.POSITIONS),
    ("bbox", Role.BOXES),
    ("pixel_values", Role.PIXELS),
    ("input_features", Role.FEATURES),
    ("ids", Role.TOKENS),
    ("logits", Role.LOGITS),
    ("hidden", Role.HIDDEN),
)


def guess_role(name: str, dtype: ir.DataType) -> Role:
    """The role that a name indicates by the conventions of Hugging Face exports; VALUES if none."""
    role_of_name = next((role for part, role in _ROLES_BY_NAME if part in name), Role.VALUES)
    integer_only = role_of_name in (Role.TOKENS, Role.SEGMENTS, Role.POSITIONS, Role.BOXES)
    wrong = (integer_only and not dtype.is_integer()) or (role_of_name in SIGNALS and not dtype.is_floating_point())
    return Role.VALUES if wrong else role_of_name


SUM = " + "
"""Separator of the axis names whose sizes add up to a dimension: `past + sequence`."""


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension, and the sizes that the model supports."""

    name: str
    minimum: int = 1
    maximum: int | None = None
    """Largest size; None if unknown."""

    def clamp(self, size: int) -> int:
        """The supported size nearest to ``size``."""
        return max(self.minimum, size if self.maximum is None else min(size, self.maximum))

    @property
    def span(self) -> str:
        """The supported sizes as text."""
        if self.maximum is None:
            return f"at least {self.minimum}"
        return f"{self.minimum} to {self.maximum}" if self.maximum > self.minimum else f"only {self.minimum}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type, shape (sizes and axis names) and role of one input or output."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]
    role: Role = Role.VALUES
    bound: int | None = None
    """Exclusive upper bound of integer values (vocabulary or table size); None if unknown."""
    pad: int = 0
    """The value at padded positions."""

    def axis_index(self, name: str) -> int | None:
        """Index of the axis called ``name``, or None."""
        return self.shape.index(name) if name in self.shape else None

    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The element type as a numpy type."""
        return np.dtype(self.dtype.numpy())


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one component, and their common axes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis] = field(default_factory=dict)

    def input(self, name: str) -> TensorSpec:
        """The input called ``name``; KeyError if there is none."""
        return next(iter(spec for spec in self.inputs if spec.name == name), None) or _missing(name)

    def mask(self) -> TensorSpec | None:
        """The attention mask input, or None."""
        return next((spec for spec in self.inputs if spec.role is Role.MASK), None)

    def shape_of(self, spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Sizes of ``spec`` when each axis has the size that ``sizes`` gives it (KeyError if one is missing)."""
        return tuple(dim if isinstance(dim, int) else sum(sizes[axis] for axis in dim.split(SUM)) for dim in spec.shape)

    def with_fixed(self, sizes: Mapping[str, int]) -> Signature:
        """The same signature with static sizes of axes; sizes of unknown axes are ignored."""
        fixed = {name: Axis(name, sizes[name], sizes[name]) for name in self.axes if name in sizes}
        return replace(self, axes={**self.axes, **fixed})

    @property
    def cached(self) -> bool:
        """True if the component has a KV cache."""
        return any(tensor.role is Role.CACHE for tensor in self.inputs)


def size_of(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension: a number, an axis, or a sum of axes; None if the size of an axis is unknown."""
    parts: list[int | None] = (
        [dim] if isinstance(dim, int) else [sizes.get(part) for part in (dim.value or "").split(SUM)]
    )
    sizes_of_parts = [part for part in parts if part is not None]
    return sum(sizes_of_parts) if len(sizes_of_parts) == len(parts) else None


def _missing(name: str) -> TensorSpec:
    raise KeyError(name)


@dataclass(frozen=True)
class Provenance:
    """Origin of a program, in terms that a second build can check (no paths, no dates)."""

    kind: str
    """``checkpoint``, ``onnx`` or ``module``."""
    architecture: str
    """Class of the model, or producer of the ONNX file."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was read, by name relative to the source."""
    notes: tuple[str, ...] = ()
    """Notes on the lowering, for the manifest."""


@dataclass
class Program:
    """Named components, their signatures, their common task, and their provenance."""

    components: dict[str, ir.Model]
    signatures: dict[str, Signature]
    task: str
    provenance: Provenance

    @property
    def generates(self) -> bool:
        """True if the components generate text token by token with a KV cache."""
        return any(signature.cached for signature in self.signatures.values()) and self.provenance.kind == "checkpoint"

    def sole(self) -> tuple[ir.Model, Signature]:
        """The only component and its signature; a ValueError if there are several."""
        if len(self.components) != 1:
            raise ValueError(f"expected one component, found {sorted(self.components)}")
        name = next(iter(self.components))
        return self.components[name], self.signatures[name]


Arrays = Mapping[str, np.ndarray]
"""Arrays by name: inputs or outputs of an engine."""


def leading_axis(signature: Signature) -> str | None:
    """The name of the batch axis: the first axis of the first input."""
    first = signature.inputs[0].shape if signature.inputs else ()
    # A tensor of rank 1 with a named axis is a sequence, not a batch.
    return first[0] if len(first) > 1 and isinstance(first[0], str) else None
