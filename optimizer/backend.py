"""What a backend promises: to emit an engine's files, to open them, and to run arrays through them.

A backend with its options (`openvino{threads=2}`) is a target. Emitting and opening are apart: the machine that
builds need not be the machine that runs.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from planish.optimizer import spec
from planish.optimizer.base import OPTIONS_CONFIG
from planish.optimizer.errors import BadInput
from planish.optimizer.program import Program, Role, TensorSpec

Arrays = Mapping[str, np.ndarray]
"""Arrays by name: what goes into an engine and what comes out."""


class Engine(abc.ABC):
    """An opened engine: numpy arrays in, numpy arrays out, by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for ``inputs``, both by name.

        A mask that is left out is all ones, segments are all zeros; integers are widened to what the engine takes.
        BadInput names an input that is unknown, missing or of the wrong kind.
        """
        unknown = sorted(set(inputs) - {tensor.name for tensor in self.inputs})
        if unknown:
            raise BadInput(
                f"this engine has no input {unknown[0]!r}{spec.did_you_mean(unknown[0], [t.name for t in self.inputs])}"
            )
        return self._run({tensor.name: self._feed(tensor, inputs) for tensor in self.inputs})

    @abc.abstractmethod
    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs for complete inputs of the right element types."""

    def _feed(self, tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
        given = inputs.get(tensor.name)
        if given is None:
            return self._default(tensor, inputs)
        if not np.can_cast(given.dtype, tensor.numpy_dtype(), "same_kind"):
            raise BadInput(f"input {tensor.name!r} is {given.dtype}, the engine takes {tensor.numpy_dtype()}")
        return np.ascontiguousarray(given, dtype=tensor.numpy_dtype())

    def _default(self, tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
        tokens = next((t.name for t in self.inputs if t.role is Role.TOKENS and t.name in inputs), None)
        fill = {Role.MASK: 1, Role.SEGMENTS: 0}.get(tensor.role)
        if tokens is None or fill is None:
            raise BadInput(f"input {tensor.name!r} is missing", advice=f"give an array of {tensor.numpy_dtype()}")
        return np.full(inputs[tokens].shape, fill, tensor.numpy_dtype())


@dataclass(frozen=True)
class Backend(abc.ABC):
    """One runtime: a frozen dataclass whose fields are the options of the target."""

    __pydantic_config__: ClassVar[dict[str, Any]] = OPTIONS_CONFIG
    name: ClassVar[str]
    distribution: ClassVar[str]
    """The package on the index that brings the runtime."""
    model_file: ClassVar[str]
    """Name of the file in an engine folder that `open` reads."""

    def __str__(self) -> str:
        """The text form; options that have their default are left out."""
        return spec.format_dataclass(self.name, self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the target from option texts; UsageError names the option, what it got and what it takes."""
        return spec.build(cls, options, owner=f"target {cls.name}")

    @abc.abstractmethod
    def emit(self, program: Program, folder: Path) -> None:
        """Write the engine's files into ``folder``, which exists and is empty."""

    @abc.abstractmethod
    def open(self, path: Path) -> Engine:
        """Open an engine folder, or a model file as the runtime reads it; MissingRuntime says what is not here."""

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str | None:
        """What keeps this machine from opening engines of this backend, in one line; None if nothing does."""

    def load(self, model: ir.Model) -> Engine:
        """An engine of a graph in memory that runs it as it is written: what passes are checked with."""
        raise BadInput(f"target {self.name} cannot run a graph from memory; use onnxruntime for checks")
