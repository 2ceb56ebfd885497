"""ONNX Runtime: `model.onnx` (and `model.onnx.data`), run by the CPU provider unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Le

from planish.optimizer import onnx_io
from planish.optimizer.backend import MOST_THREADS, Arrays, Backend, Engine, nothing
from planish.optimizer.errors import BadInput, CheckFailed, MissingRuntime, in_one_line
from planish.optimizer.graph import add_initializer, lend_weights
from planish.optimizer.pipeline import Pipeline
from planish.optimizer.program import PAST_NAME, PRESENT_NAME, Program, Role, TensorSpec, as_continued, guess_role

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

    def emit(self, program: Program, folder: Path) -> None:
        """Write `model.onnx`, with its weights beside it if they are large; several components share theirs."""
        models = {name: self._keeping(model) for name, model in program.components.items()}
        if len(models) > 1:
            onnx_io.save_together({self.file_of(name): model for name, model in models.items()}, folder)
        else:
            onnx_io.save(_lenient(next(iter(models.values()))), folder / self.model_file)

    def _keeping(self, model: ir.Model) -> ir.Model:
        """The model with its cache kept as is asked for, a copy if that changes it; CheckFailed if that cannot be."""
        if self.cache == "f32":
            return model
        outcome = Pipeline.parse("quantize-cache").run(model.clone())
        refused = [refusal for report in outcome.reports for refusal in report.refusals]
        if refused:
            reason = f"{refused[0].site} cannot be kept in 8 bits: {refused[0].reason}; leave out cache=int8"
            raise CheckFailed(reason, where=f"target {self}")
        return outcome.model

    def open(self, path: Path) -> Engine:
        """Open an engine folder or an `.onnx` file, with all of the runtime's own optimizations."""
        file = path / self.model_file if path.is_dir() else path
        if not file.is_file():
            raise BadInput("there is no ONNX model here", where=file)
        ort = self._import()
        options = self._options(ort)
        try:
            session = ort.InferenceSession(str(file), options, providers=[_PROVIDERS[self.provider]])
        except Exception as error:
            raise BadInput(f"ONNX Runtime refuses the model: {in_one_line(error)}", where=file) from error
        return OnnxRuntimeEngine(ort, session)

    def load(self, model: ir.Model) -> Engine:
        """Run a graph as it is written: no optimization, no packing, weights lent to the runtime and not copied.

        Matrices in blocks are lent as constants, and packed: as inputs their operator misreads them, and unpacked it
        computes in float.
        """
        ort = self._import()
        options = self._options(ort)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = _FATAL
        weights = lend_weights(model, constant_for=_PACKED)
        lent, constants = (
            {name: _lent(ort, tensor) for name, tensor in tensors.items()}
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


class OnnxRuntimeEngine(Engine):
    """An inference session, with the weights that are lent to it at each call, and those that it keeps reading."""

    def __init__(
        self, ort: Any, session: Any, lent: Mapping[str, Any] | None = None, constants: Mapping[str, Any] | None = None
    ) -> None:
        self._ort = ort
        self._session = session
        self._lent = dict(lent or {})
        self._constants = dict(constants or {})
        self.outputs = tuple(map(_spec, session.get_outputs()))
        inputs = tuple(_spec(port) for port in session.get_inputs() if port.name not in self._lent)
        self.inputs = tuple(as_continued(spec, self.outputs) for spec in inputs)

    def prepare(self, inputs: Arrays) -> Callable[[], object]:
        """Hand the arrays to the runtime now; the call only runs."""
        values = self._values(self._feeds(inputs))
        return lambda: self._run_values(values)

    def step(self, inputs: Arrays, cache: object | None = None) -> tuple[dict[str, np.ndarray], object]:
        """The cache stays with the runtime: its tensors go from output to input without a copy."""
        past = dict(cache) if isinstance(cache, Mapping) else {}
        own = [tensor for tensor in self.inputs if tensor.role is not Role.CACHE]
        feeds = {tensor.name: self._feed(tensor, inputs) for tensor in own}
        names = {tensor.name for tensor in self.inputs} - feeds.keys()
        empty = {t.name: nothing(t, inputs) for t in self.inputs if t.name in names - past.keys()}
        results = self._run_values(self._values(feeds | empty) | {name: past[name] for name in names & past.keys()})
        fresh = {
            name.replace(PRESENT_NAME, PAST_NAME, 1): value
            for name, value in results.items()
            if name.startswith(PRESENT_NAME)
        }
        rest = {name: value.numpy() for name, value in results.items() if not name.startswith(PRESENT_NAME)}
        return rest, past | fresh

    def select(self, cache: object, rows: np.ndarray) -> object:
        """Rows are copied: they are other texts' from now on."""
        past = cache if isinstance(cache, Mapping) else {}
        return self._values({name: np.ascontiguousarray(value.numpy()[rows]) for name, value in past.items()})

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._run_values(self._values(feeds)).items()}

    def _values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

    def _run_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        names = [tensor.name for tensor in self.outputs]
        try:
            results = self._session.run_with_ort_values(names, {**values, **self._lent})
        except Exception as error:
            raise BadInput(f"ONNX Runtime cannot run these inputs: {in_one_line(error)}") from error
        return dict(zip(names, results, strict=True))


def _lent(ort: Any, tensor: ir.TensorProtocol) -> Any:
    """A tensor where it lies in memory; the runtime does not look whether its rows follow each other."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(tensor.numpy()), int(tensor.dtype))


def _lenient(model: ir.Model) -> ir.Model:
    """A copy whose cache inputs leave heads and their size open.

    Loaders of the ecosystem make the empty cache of the first step from what config.json says of other layers, and get
    it wrong for grouped heads or heads of another size; what is empty does no harm, a fixed shape would refuse it. A
    Concat passes over what is empty. An Attention that keeps its cache inside does not, so it reads the cache behind a
    Reshape, which the runtime runs without a copy.
    """
    copy = model.clone()
    for value in copy.graph.inputs:
        if guess_role(value.name or "", value.dtype or ir.DataType.FLOAT) is not Role.CACHE or value.shape is None:
            continue
        if any(use.node.op_type == "Attention" for use in value.uses()):
            _shape_again(copy.graph, value)
        value.shape = ir.Shape([value.shape[0], f"{value.name}.heads", value.shape[2], f"{value.name}.size"])
    return copy


def _shape_again(graph: ir.Graph, cache: ir.Value) -> None:
    """Give those that read a cache its heads and their size, whatever an empty one has.

    The zeros of the target stand for the input's own axes; -1 would divide by the size of what may be empty.
    """
    heads, size = ([] if cache.shape is None else list(cache.shape))[1::2]
    if not isinstance(heads, int) or not isinstance(size, int):
        return
    name = f"cache_of_{heads}_by_{size}"
    target = graph.initializers.get(name) or add_initializer(graph, name, np.array([0, heads, 0, size], np.int64))
    readers = list(cache.uses())
    reshape = ir.node("Reshape", [cache, target], name=f"{cache.name}_shaped")
    shaped = reshape.outputs[0]
    shaped.name, shaped.shape, shaped.type = reshape.name, cache.shape, cache.type
    for reader in readers:
        reader.node.replace_input_with(reader.idx, shaped)
    graph.insert_before(graph[0], reshape)


def _spec(port: Any) -> TensorSpec:
    """What the runtime says of one input or output; its type reads `tensor(int64)`."""
    short = port.type.removeprefix("tensor(").removesuffix(")")
    dtype = ir.DataType[{"float": "FLOAT", "double": "DOUBLE"}.get(short, short.upper())]
    shape = tuple(dim if isinstance(dim, int | str) else f"dim_{index}" for index, dim in enumerate(port.shape))
    return TensorSpec(port.name, dtype, shape, guess_role(port.name, dtype))
