"""A compiled OpenVINO model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
from pydantic import StringConstraints

from planish.optimizer.errors import BadInput, in_one_line
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.kv_cache import PAST, PAST_NAME, PRESENT_NAME
from planish.optimizer.ir.program import Arrays, Role, TensorSpec, guess_role

_TYPES = {"f32": "FLOAT", "f64": "DOUBLE", "f16": "FLOAT16", "bf16": "BFLOAT16", "boolean": "BOOL"} | {
    f"{sign}{bits}": f"{'INT' if sign == 'i' else 'UINT'}{bits}" for sign in "iu" for bits in (4, 8, 16, 32, 64)
}


BEAMS = "beam_idx"
PAGE = """\
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
MOST_BUCKETS = 64
"""Each is another copy of the model in memory."""


class InferRequest:
    """An inference request and its variables, taken from a pool; back it goes when nobody holds it any more."""

    def __init__(self, idle: deque[Any], infer_request: Any) -> None:
        self._idle = idle
        self.infer_request = infer_request
        self.variables = {input_of_variable(state.name): state for state in infer_request.query_state()}
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

    def take(self) -> InferRequest:
        """A request that nobody else uses."""
        try:
            infer_request = self._idle.pop()  # atomic, unlike a look at the length before it
        except IndexError:
            infer_request = self.compiled.create_infer_request()
        return InferRequest(self._idle, infer_request)


@dataclass(frozen=True)
class HeldCache:
    """A cache inside the variables of a request, which it keeps from others, and the rows that the next step reads."""

    request: InferRequest
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
        self.inputs = (*(spec for spec in map(_spec, compiled.inputs) if spec.name != BEAMS), *cached)
        self.outputs = tuple(map(_spec, compiled.outputs))

    def prepare(self, inputs: Arrays) -> Callable[[], object]:
        """Set the variables now; the call only infers, and leaves outputs where the runtime has them."""
        feeds = self._feeds(inputs)
        request = self._request_for(feeds)
        rest = self._stateless(request, feeds)
        return lambda: _infer(request, rest)

    def counted(self, inputs: Arrays) -> tuple[Any, Mapping[str, np.ndarray]]:
        """Run once; the request, which has the performance counters of a model compiled with them, and all inputs."""
        feeds = self._feeds(inputs)
        request = self._request_for(feeds)
        _infer(request, self._stateless(request, feeds))
        return request.infer_request, feeds

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
        outputs = self._copied(_infer(request, {**feeds, BEAMS: rows}))
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

    def _request_for(self, feeds: Arrays) -> InferRequest:
        """A request of the model that was compiled for just this size, if there is one."""
        sizes = {array.shape for array in feeds.values()} if self._buckets else set()
        return self._buckets.get(sizes.pop(), self._pool).take() if len(sizes) == 1 else self._pool.take()

    def _stateless(self, request: InferRequest, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
        return {**rest, BEAMS: np.arange(_rows(feeds), dtype=np.int32)}

    def _copied(self, results: Any) -> dict[str, np.ndarray]:
        """Outputs by name, in memory of their own."""
        return {tensor.name: np.array(results[index]) for index, tensor in enumerate(self.outputs)}


def _infer(request: InferRequest, feeds: Mapping[str, np.ndarray]) -> Any:
    """Outputs by number, in memory that the next call of this request writes to."""
    try:
        return request.infer_request.infer(dict(feeds), share_inputs=True, share_outputs=True)
    except RuntimeError as error:
        raise BadInput(f"OpenVINO cannot run these inputs: {in_one_line(error)}") from error


def input_of_variable(variable: str) -> str:
    """The name of a cache among the inputs of an engine, from the name of the variable that holds it."""
    return variable.partition(PRESENT_NAME)[0]


def of_size(core: Any, file: Path, size: tuple[int, ...]) -> Any:
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


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    called = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    name = called if called in names or not names else names[0]  # what does nothing gives its name away as well
    dtype = ir.DataType[_TYPES[port.get_element_type().get_type_name()]]
    shape = tuple(
        dim.get_length() if dim.is_static else f"dim_{index}" for index, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(name, dtype, shape, guess_role(name, dtype))
