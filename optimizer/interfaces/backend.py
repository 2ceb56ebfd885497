"""The contract of a backend: it emits an engine's files, opens them, and runs arrays through them.

A backend with its options (`openvino{threads=2}`) is a target. Emitting and opening are apart: the machine that
builds need not be the machine that runs.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput, CheckFailed
from planish.optimizer.interfaces import option_text, registry
from planish.optimizer.interfaces.counters import OperatorTime, Probe
from planish.optimizer.interfaces.option_text import OPTIONS_CONFIG
from planish.optimizer.interfaces.pass_base import PassResult
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir.kv_cache import (
    PAST_NAME,
    PRESENT_NAME,
    dequantize_cache_outputs,
    empty_cache,
    quantize_cache_inputs,
)
from planish.optimizer.ir.program import Arrays, Program, Role, TensorSpec

MOST_THREADS = 1024
"""More than any machine has cores for; a runtime makes as many as it is told to, and runs out of memory."""


class Engine(abc.ABC):
    """An opened engine: numpy arrays in, numpy arrays out, by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for ``inputs``, both by name.

        A mask that is left out is all ones, segments are all zeros; integers are widened to what the engine takes. A
        cache that the engine keeps in 8 bits may be given in float, and is returned so.
        BadInput names an input that is unknown, missing or of the wrong kind.
        """
        return dequantize_cache_outputs(self._run(self._feeds(inputs)))

    def prepare(self, inputs: Arrays) -> Callable[[], object]:
        """Do now what a run needs beside the run itself; the function that is returned is what is timed."""
        feeds = self._feeds(inputs)
        return lambda: self._run(feeds)

    def step(self, inputs: Arrays, cache: object | None = None) -> tuple[dict[str, np.ndarray], object]:
        """Run behind ``cache``, which an earlier step gave (None: nothing is cached), and give the new one.

        ``inputs`` and the outputs that are returned are those without the cache. How it is kept is the engine's
        business; a cache is good for one step.
        """
        past = {} if cache is None else dict(_as_arrays(cache))
        empty = {t.name: empty_cache(t, inputs) for t in self.inputs if t.role is Role.CACHE and t.name not in past}
        known = {tensor.name for tensor in self.inputs}
        outputs = self.run({**inputs, **empty, **{name: array for name, array in past.items() if name in known}})
        fresh = {n.replace(PRESENT_NAME, PAST_NAME, 1): a for n, a in outputs.items() if n.startswith(PRESENT_NAME)}
        return {name: array for name, array in outputs.items() if not name.startswith(PRESENT_NAME)}, past | fresh

    def select(self, cache: object, rows: np.ndarray) -> object:
        """The cache with these rows of its batch, in this order: what beam search asks for."""
        return {name: array[rows] for name, array in _as_arrays(cache).items()}

    def _feeds(self, inputs: Arrays) -> dict[str, np.ndarray]:
        unknown = sorted(set(inputs) - {tensor.name for tensor in self.inputs})
        if unknown:
            hint = option_text.did_you_mean(unknown[0], [tensor.name for tensor in self.inputs])
            raise BadInput(f"this engine has no input {unknown[0]!r}{hint}")
        given = {**inputs, **quantize_cache_inputs(self.inputs, inputs)}
        return {tensor.name: self._feed(tensor, given) for tensor in self.inputs}

    @abc.abstractmethod
    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs for complete inputs of the right element types."""

    def _feed(self, tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
        given = inputs.get(tensor.name)
        if given is None:
            return self._default(tensor, inputs)
        if not np.can_cast(given.dtype, tensor.numpy_dtype(), "same_kind"):
            raise BadInput(f"input {tensor.name!r} is {given.dtype}, the engine takes {tensor.numpy_dtype()}")
        if tensor.role is Role.CACHE and given.size and not _fits(tensor, given.shape):
            raise BadInput(f"input {tensor.name!r} has shape {given.shape}, the engine takes {tensor.shape}")
        return np.asarray(given, tensor.numpy_dtype(), order="C")  # `ascontiguousarray` gives a scalar an axis

    def _default(self, tensor: TensorSpec, inputs: Arrays) -> np.ndarray:
        """A mask of ones, segments of zeros, positions that count on behind the cache."""
        tokens = next((t.name for t in self.inputs if t.role is Role.TOKENS and t.name in inputs), None)
        fill = {Role.MASK: 1, Role.SEGMENTS: 0, Role.POSITIONS: 0}.get(tensor.role)
        if tokens is None or fill is None:
            raise BadInput(f"input {tensor.name!r} is missing", advice=f"give an array of {tensor.numpy_dtype()}")
        shape = inputs[tokens].shape
        past = max((array.shape[2] for name, array in inputs.items() if name.startswith(PAST_NAME)), default=0)
        if tensor.role is Role.POSITIONS:
            return np.broadcast_to(np.arange(past, past + shape[1]), shape).astype(tensor.numpy_dtype())
        longer = past if tensor.role is Role.MASK and len(shape) == 2 else 0
        return np.full((*shape[:-1], shape[-1] + longer), fill, tensor.numpy_dtype())


def _fits(tensor: TensorSpec, shape: tuple[int, ...]) -> bool:
    """True if a shape has the rank and the fixed sizes of a tensor."""
    return len(shape) == len(tensor.shape) and all(
        size == dim for size, dim in zip(shape, tensor.shape, strict=True) if isinstance(dim, int)
    )


def _as_arrays(cache: object) -> Arrays:
    if not isinstance(cache, Mapping):
        raise BadInput("this is not a cache that an engine gave")
    return cache


@dataclass(frozen=True)
class RequiredPass:
    """A pass that every engine of a target needs because of an option, whatever pipeline made its graphs."""

    text: str
    """The pass with its options."""
    promise: str
    """The effect of the pass, for a site that refuses it: `kept in 8 bits`."""
    option: str
    """The option that asks for it, as text: `cache=int8`."""


@dataclass(frozen=True)
class Backend(abc.ABC):
    """One runtime: a frozen dataclass whose fields are the options of the target."""

    __pydantic_config__: ClassVar[dict[str, Any]] = OPTIONS_CONFIG
    name: ClassVar[str]
    distribution: ClassVar[str]
    """The package on the index that brings the runtime."""
    model_file: ClassVar[str]
    """Name of the file in an engine folder that `open` reads: that of the component `model`."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of single files that `open` reads, whoever made them: `.onnx`."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions decide what its engines give: the manifest records them."""
    presets: ClassVar[Mapping[str, Sequence[Recipe]]] = {}
    """Preset -> what is tried for it; for a preset that is not here, the passes that every target shares."""

    def __str__(self) -> str:
        """The text form; options that have their default are left out."""
        return option_text.format_dataclass(self.name, self)

    @property
    def rounds(self) -> bool:
        """True if its options make engines compute or keep something in fewer bits than their graphs say."""
        return False

    @property
    def arithmetic(self) -> str:
        """The type in which an engine computes on this machine what its graph says in float32: `f32`, `bf16`."""
        return "f32"

    @property
    def arithmetics(self) -> tuple[Self, ...]:
        """The target in each arithmetic that a preset which rounds may choose; itself alone if its options say which.

        What loaders get without options comes first: it is chosen where it keeps the budget. The last is `self`.
        """
        return (self,)

    @property
    def required_passes(self) -> tuple[RequiredPass, ...]:
        """Passes that engines need because of its options; `emit` calls `with_required_passes`."""
        return ()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the target from option texts; UsageError names the option, what it got and what it takes."""
        return option_text.build(cls, options, owner=f"target {cls.name}")

    @classmethod
    def file_of(cls, component: str) -> str:
        """Name of the file of one component, as the ecosystem's loaders expect it."""
        return cls.model_file.replace("model", component, 1)

    @classmethod
    def path_of(cls, component: str, folder: Path) -> Path:
        """The path to `open` for one component: the folder itself where there is no other, else a file in it."""
        return folder if component == "model" else folder / cls.file_of(component)

    def with_required_passes(self, program: Program) -> Program:
        """The program with its required passes run, on copies; CheckFailed where one of them refuses a site."""
        for required in self.required_passes:
            components = {name: self._changed(model, required) for name, model in program.components.items()}
            program = replace(program, components=components)
        return program

    def _changed(self, model: ir.Model, required: RequiredPass) -> ir.Model:
        spec = option_text.parse_one(required.text, what="pass")
        result = registry.pass_class(spec.name).from_options(spec.options)(model.clone())
        if isinstance(result, PassResult) and result.refusals:
            first = result.refusals[0]
            reason = f"{first.site} cannot be {required.promise}: {first.reason}; leave out {required.option}"
            raise CheckFailed(reason, where=f"target {self}")
        return result.model

    @abc.abstractmethod
    def emit(self, program: Program, folder: Path) -> None:
        """Write the engine's files into ``folder``, which exists and is empty."""

    @abc.abstractmethod
    def open(self, path: Path) -> Engine:
        """Open an engine folder, or a model file as the runtime reads it; MissingRuntime says what is not here."""

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str | None:
        """The reason, in one line, why this machine cannot open engines of this backend; None if it can."""

    def operator_times(self, path: Path, inputs: Arrays, calls: int) -> list[OperatorTime]:
        """Open an engine with the runtime's counters, run it ``calls`` times on ``inputs``; its operators, in order.

        BadInput where the runtime has no counters.
        """
        raise BadInput(f"target {self} tells no time of single operators", where=path)

    @property
    def has_counters(self) -> bool:
        """True if `operator_times` tells the time of single operators with these options."""
        return type(self).operator_times is not Backend.operator_times

    @classmethod
    def probes(cls) -> Sequence[Probe]:
        """Products that show the peaks of this machine, one for each type in which the runtime multiplies here."""
        return ()

    def as_loaders_open(self) -> Self | None:
        """The target as the ecosystem's loaders open its files when they are given no options.

        None if that computes in the same precision on this machine, or cannot be told here.
        """
        return None

    def mapped(self) -> Self | None:
        """This target with weights that stay in their file and are never copied, for a model larger than memory.

        None if the runtime must hold all of them.
        """
        return None

    def load(self, model: ir.Model) -> Engine:
        """An engine of a graph in memory that runs it as it is written: what passes are checked with."""
        raise BadInput(f"target {self.name} cannot run a graph from memory")

    @classmethod
    def interprets(cls) -> bool:
        """True if it runs graphs from memory."""
        return cls.load is not Backend.load
