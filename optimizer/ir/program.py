"""The unit that is optimized: graphs, and what their inputs and outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import onnx_ir as ir


class Role(StrEnum):
    """What a tensor at the border of a component means; decides how inputs are made and outputs compared."""

    TOKENS = "tokens"
    """Integer ids, each below the tensor's ``bound``."""
    MASK = "mask"
    """1 where a token counts, 0 where it is padding."""
    SEGMENTS = "segments"
    """Small integers that tell sentence A from sentence B, each below ``bound``."""
    POSITIONS = "positions"
    """0, 1, 2, … along the sequence."""
    BOXES = "boxes"
    """Four coordinates (x0 ≤ x1, y0 ≤ y1) of each token on its page, each below ``bound``."""
    PIXELS = "pixels"
    """Images as a checkpoint's processor gives them, (batch, channels, height, width), near zero and of size one."""
    FEATURES = "features"
    """Spectra of a recording over time, (batch, bins, frames), padded at their end with their lowest value."""
    VALUES = "values"
    """Real numbers without further meaning."""
    CACHE = "cache"
    """Keys or values of earlier tokens, (batch, heads, past, size)."""
    HIDDEN = "hidden"
    """Hidden states: vectors along the last axis."""
    LOGITS = "logits"
    """Unnormalized scores: the arg max along the last axis is the answer."""


SIGNALS = frozenset({Role.PIXELS, Role.FEATURES})
"""Roles of what is seen or heard: real numbers that a processor made, where texts have tokens."""
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
    """The role that a name suggests, by the conventions of Hugging Face exports; VALUES if it suggests none."""
    found = next((role for part, role in _ROLES_BY_NAME if part in name), Role.VALUES)
    integer_only = found in (Role.TOKENS, Role.SEGMENTS, Role.POSITIONS, Role.BOXES)
    wrong = (integer_only and not dtype.is_integer()) or (found in SIGNALS and not dtype.is_floating_point())
    return Role.VALUES if wrong else found


SUM = " + "
"""Between the names of axes whose sizes add up to a dimension: `past + sequence`."""


@dataclass(frozen=True)
class Axis:
    """A dimension whose size is chosen at run time, and the sizes that the model accepts."""

    name: str
    minimum: int = 1
    maximum: int | None = None
    """None: no limit is known."""

    def clamp(self, size: int) -> int:
        """The accepted size nearest to ``size``."""
        return max(self.minimum, size if self.maximum is None else min(size, self.maximum))

    @property
    def span(self) -> str:
        """The accepted sizes as text."""
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
        """Position of the axis called ``name``, or None."""
        return self.shape.index(name) if name in self.shape else None

    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The element type as numpy knows it."""
        return np.dtype(self.dtype.numpy())


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one component, and the axes that they share."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis] = field(default_factory=dict)

    def input(self, name: str) -> TensorSpec:
        """The input called ``name``; KeyError if there is none."""
        return next(iter(spec for spec in self.inputs if spec.name == name), None) or _missing(name)

    def mask(self) -> TensorSpec | None:
        """The input that tells tokens from padding, if the component takes one."""
        return next((spec for spec in self.inputs if spec.role is Role.MASK), None)

    def shape_of(self, spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Sizes of ``spec`` when each axis has the size that ``sizes`` gives it (KeyError if one is missing)."""
        return tuple(dim if isinstance(dim, int) else sum(sizes[axis] for axis in dim.split(SUM)) for dim in spec.shape)

    def with_fixed(self, sizes: Mapping[str, int]) -> Signature:
        """The same with axes that have one size only; sizes of axes that it does not have are left out."""
        fixed = {name: Axis(name, sizes[name], sizes[name]) for name in self.axes if name in sizes}
        return replace(self, axes={**self.axes, **fixed})

    @property
    def cached(self) -> bool:
        """Whether the component takes a cache."""
        return any(tensor.role is Role.CACHE for tensor in self.inputs)


def size_of(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension: a number, an axis, or a sum of axes; None if one of them has no known size."""
    parts: list[int | None] = (
        [dim] if isinstance(dim, int) else [sizes.get(part) for part in (dim.value or "").split(SUM)]
    )
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _missing(name: str) -> TensorSpec:
    raise KeyError(name)


@dataclass(frozen=True)
class Provenance:
    """Where a program came from, in terms that a second build can check (no paths, no dates)."""

    kind: str
    """``checkpoint``, ``onnx`` or ``module``."""
    architecture: str
    """Class of the model, or producer of the ONNX file."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was read, by name relative to the source."""
    notes: tuple[str, ...] = ()
    """What a reader of the manifest should know about how this was lowered."""


@dataclass
class Program:
    """Named components, their signatures, the task they serve together, and their provenance."""

    components: dict[str, ir.Model]
    signatures: dict[str, Signature]
    task: str
    provenance: Provenance

    @property
    def generates(self) -> bool:
        """Whether the components go on with texts, token by token, behind a cache."""
        return any(signature.cached for signature in self.signatures.values()) and self.provenance.kind == "checkpoint"

    def sole(self) -> tuple[ir.Model, Signature]:
        """The only component and its signature; a ValueError if there are several."""
        if len(self.components) != 1:
            raise ValueError(f"expected one component, found {sorted(self.components)}")
        name = next(iter(self.components))
        return self.components[name], self.signatures[name]


Arrays = Mapping[str, np.ndarray]
"""Arrays by name: what goes into an engine and what comes out."""


def leading_axis(signature: Signature) -> str | None:
    """The name of the axis that counts independent examples: the first of the first input."""
    first = signature.inputs[0].shape if signature.inputs else ()
    return first[0] if len(first) > 1 and isinstance(first[0], str) else None
