"""OpenVINO: `openvino_model.xml` and `openvino_model.bin`, compiled for the CPU device unless told otherwise.

The IR is written by OpenVINO's own ONNX frontend, so this backend needs the package to emit as well as to run.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Le, MaxLen
from pydantic import StringConstraints

from planish.optimizer import onnx_io
from planish.optimizer.backend import MOST_THREADS, Arrays, Backend, Engine
from planish.optimizer.errors import BadInput, CheckFailed, MissingRuntime, in_one_line
from planish.optimizer.graph import FINITE_MASK
from planish.optimizer.program import PAST, PAST_NAME, PRESENT_NAME, Program, Role, TensorSpec, guess_role
from planish.optimizer.scratch import scratch_folder

_TYPES = {"f32": "FLOAT", "f64": "DOUBLE", "f16": "FLOAT16", "bf16": "BFLOAT16", "boolean": "BOOL"} | {
    f"{sign}{bits}": f"{'INT' if sign == 'i' else 'UINT'}{bits}" for sign in "iu" for bits in (4, 8, 16, 32, 64)
}


_BEAMS = "beam_idx"
PROPERTIES = "openvino_properties.json"
"""The file of properties that loaders must give to get what was checked."""
_PAGE = """\
# Loading this engine

It was checked with the properties {properties}. OpenVINO reads no precision from a model file: without them it computes
in bfloat16 on processors that have it and in float16 on GPUs. `planish.json` (`targets`, `openvino`, `as_loaders_open`)
says what that gave on the machine of the build, where it differs.

```python
import json
import openvino as ov

with open("openvino_properties.json") as file:
    properties = json.load(file)
core = ov.Core()
{calls}
```

With optimum-intel: `OVModelFor….from_pretrained(folder, ov_config=properties)`.
"""


Size = Annotated[str, StringConstraints(pattern="^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$")]
_MOST_BUCKETS = 64
"""Each is another copy of the model in memory."""


@dataclass(frozen=True)
class OpenVino(Backend):
    """OpenVINO through its Python binding."""

    name: ClassVar[str] = "openvino"
    distribution: ClassVar[str] = "openvino"
    model_file: ClassVar[str] = "openvino_model.xml"

    threads: Annotated[int, Ge(0), Le(MOST_THREADS)] = 0
    """Threads of one inference; 0 lets the runtime take one per core."""

    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    """The device that the model is compiled for."""

    precision: Literal["f32", "bf16", "f16", "default"] = "f32"
    """Arithmetic of floating-point operators. `default` is what loaders get that are given no options: bf16 on CPUs
    that have it, f16 on GPUs; no file can tell the runtime otherwise, so `openvino_properties.json` goes with it."""

    cache: Literal["f32", "f16", "u8"] = "f32"
    """How a decoder keeps keys and values between its steps; u8 in groups, each with a scale. It is written into the
    file: every loader does it so."""

    buckets: Annotated[tuple[Size, ...], MaxLen(_MOST_BUCKETS)] = ()
    """Texts and tokens, as `1x16`, for which the model is compiled a second time: calls of exactly this size run with
    shapes that are known, for the memory of another copy; all others run as ever. Not for models that keep a cache."""

    @property
    def rounds(self) -> bool:
        """Where arithmetic or the cache has fewer bits than 32."""
        return (self.precision, self.cache) != ("f32", "f32")

    def emit(self, program: Program, folder: Path) -> None:
        """Convert through ONNX and write the IR, weights as they are (never halved in silence).

        A decoder that is a program of its own keeps its cache inside, as variables. Beside it lie the properties that
        loaders must give, and a page that says so.
        """
        ov = self._import()
        self._write_properties(folder, [self.file_of(name) for name in program.components])
        for name, model in program.components.items():
            with scratch_folder(folder.parent) as scratch:
                source = scratch / "model.onnx"
                onnx_io.save(model, source)
                try:
                    converted = ov.Core().read_model(str(source))
                    _drop_guards(converted, {n.name for n in model.graph if FINITE_MASK in n.metadata_props})
                    if len(program.components) == 1 and program.signatures[name].cached:
                        make_stateful(ov, converted, self.cache)
                except RuntimeError as error:
                    raise CheckFailed(f"OpenVINO cannot convert the graph: {in_one_line(error)}") from error
                _give_stable_names(converted)
                ov.save_model(converted, str(folder / self.file_of(name)), compress_to_fp16=False)
                del converted  # it maps the scratch file

    def open(self, path: Path) -> Engine:
        """Open an engine folder, an `.xml` or an `.onnx` file."""
        file = path / self.model_file if path.is_dir() else path
        if not file.is_file():
            raise BadInput("there is no OpenVINO model here", where=file)
        ov = self._import()
        core = ov.Core()
        if self.device not in {device.partition(".")[0] for device in core.available_devices}:
            raise MissingRuntime(f"OpenVINO finds no {self.device} on this machine", where=f"target {self}")
        try:
            compiled = core.compile_model(str(file), self.device, self._config())
            sizes = [tuple(map(int, text.split("x"))) for text in self.buckets]
            models = {size: _of_size(core, file, size) for size in sizes}
            buckets = {size: core.compile_model(m, self.device, self._config()) for size, m in models.items()}
        except RuntimeError as error:
            raise BadInput(f"OpenVINO refuses the model: {in_one_line(error)}", where=file) from error
        return OpenVinoEngine(ov, compiled, buckets)

    @classmethod
    def missing(cls) -> str | None:
        """Not installed, or broken; None if it imports."""
        try:
            _import_quietly()
        except ImportError as error:
            return f"openvino does not import ({error}); pip install 'planish[cpu]'"
        return None

    def _import(self) -> Any:
        reason = self.missing()
        if reason is not None:
            raise MissingRuntime(reason, where="target openvino")
        return _import_quietly()

    def as_loaders_open(self) -> Self | None:
        """With the runtime's own precision, where that is another one here."""
        if self.precision == "default" or self.missing() is not None:
            return None
        core = _import_quietly().Core()
        if self.device not in {device.partition(".")[0] for device in core.available_devices}:
            return None
        preferred = core.get_property(self.device, "INFERENCE_PRECISION_HINT").get_type_name()
        return None if preferred == self.precision else replace(self, precision="default", threads=0, buckets=())

    def _write_properties(self, folder: Path, files: Sequence[str]) -> None:
        properties = self._precision()
        if properties:
            (folder / PROPERTIES).write_text(json.dumps(properties) + "\n", encoding="utf-8")
            calls = [f'{Path(name).stem} = core.compile_model("{name}", "{self.device}", properties)' for name in files]
            page = _PAGE.format(properties=json.dumps(properties), calls="\n".join(calls))
            (folder / "README.md").write_text(page, encoding="utf-8")

    def _precision(self) -> dict[str, object]:
        return {} if self.precision == "default" else {"INFERENCE_PRECISION_HINT": self.precision}

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", **self._precision()}
        return config | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})


class Request:
    """An inference request and its variables, taken from a pool; back it goes when nobody holds it any more."""

    def __init__(self, idle: deque[Any], infer_request: Any) -> None:
        self._idle = idle
        self.infer_request = infer_request
        self.variables = {state.name.partition(PRESENT_NAME)[0]: state for state in infer_request.query_state()}
        self.steps = 0
        """Steps of a text so far: a cache that an earlier one gave is no longer there."""

    def __del__(self) -> None:
        """Give the request back."""
        self._idle.append(self.infer_request)


class RequestPool:
    """Inference requests of one compiled model: as many as were ever needed at the same time, one to begin with."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: deque[Any] = deque([compiled.create_infer_request()])

    def take(self) -> Request:
        """A request that nobody else uses."""
        try:
            infer_request = self._idle.pop()  # atomic, unlike a look at the length before it
        except IndexError:
            infer_request = self.compiled.create_infer_request()
        return Request(self._idle, infer_request)


@dataclass(frozen=True)
class HeldCache:
    """A cache inside the variables of a request, which it keeps from others, and the rows that the next step reads."""

    request: Request
    step: int
    rows: np.ndarray


class OpenVinoEngine(Engine):
    """A compiled model and a pool of inference requests, so that threads may call it at the same time.

    Where the model keeps its cache inside, `run` still takes and gives it by name: the variables are set before and
    read after. `step` leaves it where it is, in a request that belongs to these texts until their cache is dropped.
    """

    def __init__(self, ov: Any, compiled: Any, buckets: Mapping[tuple[int, ...], Any] | None = None) -> None:
        """``buckets`` are the same model, compiled for inputs of one shape each."""
        self._tensor = ov.Tensor
        self._pool = RequestPool(compiled)
        self._buckets = {size: RequestPool(model) for size, model in (buckets or {}).items()}
        self._variables = tuple(self._pool.take().variables)
        cached = tuple(
            TensorSpec(name, ir.DataType.FLOAT, ("batch", "heads", PAST, "size"), Role.CACHE)
            for name in self._variables
        )
        self.inputs = (*(spec for spec in map(_spec, compiled.inputs) if spec.name != _BEAMS), *cached)
        self.outputs = tuple(map(_spec, compiled.outputs))

    def prepare(self, inputs: Arrays) -> Callable[[], object]:
        """Set the variables now; the call only infers, and leaves outputs where the runtime has them."""
        feeds = self._feeds(inputs)
        request = self._request_for(feeds)
        rest = self._stateless(request, feeds)
        return lambda: _infer(request, rest)

    def step(self, inputs: Arrays, cache: object | None = None) -> tuple[dict[str, np.ndarray], object]:
        """The cache stays in the variables of its request; what is handed round says which rows the next step reads."""
        if not self._variables:
            return super().step(inputs, cache)
        if cache is None:
            request, rows = self._pool.take(), np.arange(_rows(inputs), dtype=np.int32)
            request.infer_request.reset_state()
        elif isinstance(cache, HeldCache) and cache.step == cache.request.steps:
            request, rows = cache.request, cache.rows
        else:
            raise BadInput("this is not the cache that the last step gave", advice="a cache is good for one step")
        feeds = {spec.name: self._feed(spec, inputs) for spec in self.inputs if spec.role is not Role.CACHE}
        request.steps += 1
        outputs = self._copied(_infer(request, {**feeds, _BEAMS: rows}))
        return outputs, HeldCache(request, request.steps, np.arange(_rows(inputs), dtype=np.int32))

    def select(self, cache: object, rows: np.ndarray) -> object:
        """The next step reads these rows."""
        if not isinstance(cache, HeldCache):
            return super().select(cache, rows)
        return replace(cache, rows=np.asarray(cache.rows[rows], np.int32))

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = self._request_for(feeds)
        outputs = self._copied(_infer(request, self._stateless(request, feeds)))
        presents = {
            name.replace(PAST_NAME, PRESENT_NAME, 1): np.array(state.state.data)
            for name, state in request.variables.items()
        }
        return outputs | presents

    def _request_for(self, feeds: Arrays) -> Request:
        """A request of the model that was compiled for just this size, if there is one."""
        sizes = {array.shape for array in feeds.values()} if self._buckets else set()
        return self._buckets.get(sizes.pop(), self._pool).take() if len(sizes) == 1 else self._pool.take()

    def _stateless(self, request: Request, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put the cache that is among the inputs into the variables; the inputs that remain."""
        if not self._variables:
            return dict(feeds)
        request.infer_request.reset_state()
        for name, state in request.variables.items():
            if feeds[name].shape[2]:
                try:
                    state.state = self._tensor(feeds[name])
                except RuntimeError as error:
                    raise BadInput(f"OpenVINO cannot take {name!r} as a cache: {in_one_line(error)}") from error
        rest = {name: array for name, array in feeds.items() if name not in self._variables}
        return {**rest, _BEAMS: np.arange(_rows(feeds), dtype=np.int32)}

    def _copied(self, results: Any) -> dict[str, np.ndarray]:
        """Outputs by name, in memory of their own."""
        return {tensor.name: np.array(results[index]) for index, tensor in enumerate(self.outputs)}


def _infer(request: Request, feeds: Mapping[str, np.ndarray]) -> Any:
    """Outputs by number, in memory that the next call of this request writes to."""
    try:
        return request.infer_request.infer(dict(feeds), share_inputs=True, share_outputs=True)
    except RuntimeError as error:
        raise BadInput(f"OpenVINO cannot run these inputs: {in_one_line(error)}") from error


def _of_size(core: Any, file: Path, size: tuple[int, ...]) -> Any:
    """The model in a file with all inputs of one shape (texts, tokens)."""
    model = core.read_model(str(file))
    odd = [port.get_any_name() for port in model.inputs if len(port.get_partial_shape()) != len(size)]
    if odd:
        what = f"input {odd[0]!r} has other axes than texts and tokens, so there are no buckets"
        raise BadInput(what, where=file, advice="leave out the option buckets")
    model.reshape({port: list(size) for port in model.inputs})
    return model


def _rows(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def make_stateful(ov: Any, model: Any, cache: str) -> None:
    """Keep the cache inside the model: inputs `past_key_values.…` and outputs `present.…` become variables.

    The rows of the cache that a step reads are chosen by the input `beam_idx`, shape (batch,), as the ecosystem's
    loaders give it. What the cache is kept in is said in the file: the runtime's own default is 8 bits, in silence.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    pasts = [name for port in model.inputs for name in port.get_names() if name.startswith(PAST_NAME)]
    batch = model.input("input_ids").get_partial_shape()[0]
    beams = ops.parameter(ov.PartialShape([batch]), ov.Type.i32, name=_BEAMS)
    beams.output(0).get_tensor().add_names({_BEAMS})
    model.add_parameters([beams])
    for name in pasts:
        port = model.input(name)
        readers = port.get_target_inputs()
        chosen = ops.gather(port, beams, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: name.replace(PAST_NAME, PRESENT_NAME, 1) for name in pasts})
    _start_empty(ops, model)
    model.set_rt_info(cache, ["runtime_options", "KV_CACHE_PRECISION"])


def _start_empty(ops: Any, model: Any) -> None:
    """Let each variable begin with as many rows as there are texts, and no tokens."""
    shape = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0]), ops.constant(0))
    for operator in model.get_ops():
        if operator.get_type_name() == "ReadValue":
            dims = [dim.min_length for dim in operator.get_output_partial_shape(0)]
            rest = ops.constant(np.array(dims[1:], np.int64))
            zeros = ops.constant(0.0, dtype=operator.get_output_element_type(0))
            operator.set_arguments([ops.broadcast(zeros, ops.concat([batch, rest], axis=0))])
    model.validate_nodes_and_infer_types()


def _drop_guards(model: Any, names: Set[str | None]) -> None:
    """Read attention as it is where the frontend replaces NaN in the results of these nodes, which have none."""
    for operator in model.get_ops():
        if operator.get_type_name() != "Select" or operator.get_friendly_name() not in names:
            continue
        test, result = operator.input_value(0).get_node(), operator.input_value(2)
        if test.get_type_name() == "IsNaN" and test.input_value(0) == result:
            for reader in operator.output(0).get_target_inputs():
                reader.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def _import_quietly() -> Any:
    """Import openvino without the usage report that its package sends on import.

    With `openvino_telemetry` out of reach the package takes the stub that it brings for that case.
    """
    if "openvino" not in sys.modules:
        hidden = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules["openvino_telemetry"]
            if hidden is not None:
                sys.modules["openvino_telemetry"] = hidden
    import openvino

    return openvino


def _give_stable_names(model: Any) -> None:
    """Name anonymous operators by their place: the names the runtime makes up count every model of the process."""
    for index, operator in enumerate(model.get_ordered_ops()):
        made_up = operator.get_friendly_name() == operator.get_name()
        if made_up and operator.get_type_name() not in ("Parameter", "Result"):
            operator.set_friendly_name(f"{operator.get_type_name()}_{index}")


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    called = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    name = called if called in names or not names else names[0]  # what does nothing gives its name away as well
    dtype = ir.DataType[_TYPES[port.get_element_type().get_type_name()]]
    shape = tuple(
        dim.get_length() if dim.is_static else f"dim_{index}" for index, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(name, dtype, shape, guess_role(name, dtype))
