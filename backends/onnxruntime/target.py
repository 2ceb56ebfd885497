"""ONNX Runtime: `model.onnx` (and `model.onnx.data`), run by the CPU provider unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import onnx_ir as ir
from annotated_types import Ge, Le

from planish.backends.onnxruntime.counters import operator_times
from planish.backends.onnxruntime.emit import open_cache_sizes
from planish.backends.onnxruntime.engine import OnnxRuntimeEngine, ort_value_of
from planish.backends.onnxruntime.presets import PRESETS
from planish.optimizer.errors import BadInput, CheckFailed, MissingRuntime, in_one_line
from planish.optimizer.interfaces.backend import MOST_THREADS, Backend, Engine, RequiredPass
from planish.optimizer.interfaces.counters import OperatorTime, Probe
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Arrays, Program
from planish.optimizer.ir.weightless import detach_weights
from planish.optimizer.system.scratch import scratch_folder

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_WARNING, _FATAL = 2, 4
_PACKED = frozenset({"MatMulNBits"})
"""Operators whose constants must stay constant."""


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX Runtime through its Python binding."""

    name: ClassVar[str] = "onnxruntime"
    distribution: ClassVar[str] = "onnxruntime"
    model_file: ClassVar[str] = "model.onnx"
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    presets: ClassVar[Mapping[str, Sequence[Recipe]]] = PRESETS

    threads: Annotated[int, Ge(0), Le(MOST_THREADS)] = 0
    """Threads that share one operator; 0 lets the runtime take one per core."""

    provider: Literal["cpu", "cuda"] = "cpu"
    """The execution provider that runs the graph."""

    cache: Literal["f32", "int8"] = "f32"
    """How a decoder keeps keys and values between its steps; int8 with a scale for each token and head (the pass
    `quantize-cache`): a quarter of the memory, and a little slower for single texts."""

    weights: Literal["packed", "mapped"] = "packed"
    """`packed` copies them into memory in the order that kernels read fastest; `mapped` leaves them in the file, for a
    model larger than memory: slower."""

    @property
    def rounds(self) -> bool:
        """Where the cache is kept in 8 bits."""
        return self.cache != "f32"

    @property
    def required_passes(self) -> tuple[RequiredPass, ...]:
        """The pass that stores the cache in 8 bits, in the plain lowering as well: components exchange it."""
        return (RequiredPass("quantize-cache", "kept in 8 bits", "cache=int8"),) if self.cache == "int8" else ()

    def emit(self, program: Program, folder: Path) -> None:
        """Write `model.onnx`, with its weights beside it if they are large; several components share theirs."""
        models = self.with_required_passes(program).components
        if len(models) > 1:
            onnx_io.save_together({self.file_of(name): model for name, model in models.items()}, folder)
        else:
            onnx_io.save(open_cache_sizes(next(iter(models.values()))), folder / self.model_file)

    def open(self, path: Path) -> Engine:
        """Open an engine folder or an `.onnx` file, with all of the runtime's own optimizations."""
        ort = self._import()
        return OnnxRuntimeEngine(ort, self._session(ort, self._file(path), self._options(ort)))

    def operator_times(self, path: Path, inputs: Arrays, calls: int) -> list[OperatorTime]:
        """From the profile that the runtime writes."""
        if not self.has_counters:
            return super().operator_times(path, inputs, calls)
        ort, file = self._import(), self._file(path)
        options = self._options(ort)
        options.enable_profiling = True
        with scratch_folder() as scratch:
            options.profile_file_prefix = str(scratch / "profile")
            session = self._session(ort, file, options)
            call = OnnxRuntimeEngine(ort, session).prepare(inputs)
            for _ in range(calls + 1):
                call()
            return operator_times(Path(session.end_profiling()), file)

    @property
    def has_counters(self) -> bool:
        """On the processor: elsewhere peaks are other ones, and counters tell when work was handed over."""
        return self.provider == "cpu"

    @classmethod
    def probes(cls) -> Sequence[Probe]:
        """Its kernels compute in f32 and in 8 bits."""
        return (Probe("f32", "onnxruntime"), Probe("i8", "onnxruntime", "MatMulInteger"))

    def _file(self, path: Path) -> Path:
        file = path / self.model_file if path.is_dir() else path
        if not file.is_file():
            raise BadInput("there is no ONNX model here", where=file)
        return file

    def _session(self, ort: Any, file: Path, options: Any) -> Any:
        try:
            return ort.InferenceSession(str(file), options, providers=[_PROVIDERS[self.provider]])
        except Exception as error:
            raise BadInput(f"ONNX Runtime refuses the model: {in_one_line(error)}", where=file) from error

    def load(self, model: ir.Model) -> Engine:
        """Run a graph as it is written: no optimization, no packing, weights lent to the runtime and not copied.

        Matrices in blocks are lent as constants, and packed: as inputs their operator misreads them, and unpacked it
        computes in float.
        """
        ort = self._import()
        options = self._options(ort)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = _FATAL
        weights = detach_weights(model, constant_for=_PACKED)
        lent, constants = (
            {name: ort_value_of(ort, tensor) for name, tensor in tensors.items()}
            for tensors in (weights.inputs, weights.constants)
        )
        blocks = any(node.op_type in _PACKED for node in model.graph)
        options.add_session_config_entry("session.disable_prepacking", "0" if blocks else "1")
        options.add_external_initializers(list(constants), list(constants.values()))
        try:
            session = ort.InferenceSession(
                ir.to_proto(weights.model).SerializeToString(), options, providers=[_PROVIDERS[self.provider]]
            )
        except Exception as error:
            raise CheckFailed(f"ONNX Runtime refuses the graph: {in_one_line(error)}") from error
        return OnnxRuntimeEngine(ort, session, lent, constants)

    def mapped(self) -> Self | None:
        """Weights stay in `model.onnx.data`."""
        return replace(self, weights="mapped") if self.provider == "cpu" else None

    @classmethod
    def missing(cls) -> str | None:
        """Not installed, or broken; None if it imports."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"onnxruntime does not import ({error}); pip install 'planish[cpu]'"
        return None

    def _import(self) -> Any:
        reason = self.missing()
        if reason is not None:
            raise MissingRuntime(reason, where="target onnxruntime")
        import onnxruntime as ort

        ort.disable_telemetry_events()
        wanted = _PROVIDERS[self.provider]
        if wanted not in ort.get_available_providers():
            raise MissingRuntime(
                f"this build of ONNX Runtime has no {wanted}",
                where=f"target {self}",
                advice="pip install 'planish[gpu]' in an environment without planish[cpu]",
            )
        return ort

    def _options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _FATAL if self.provider == "cpu" else _WARNING  # failures are raised as well
        if self.weights == "mapped":
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options
