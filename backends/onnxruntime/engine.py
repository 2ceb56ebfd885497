"""An opened ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput, in_one_line
from planish.optimizer.interfaces.backend import Engine
from planish.optimizer.ir.kv_cache import PAST_NAME, PRESENT_NAME, as_continued, empty_cache
from planish.optimizer.ir.program import Arrays, Role, TensorSpec, guess_role


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
        empty = {t.name: empty_cache(t, inputs) for t in self.inputs if t.name in names - past.keys()}
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


def ort_value_of(ort: Any, tensor: ir.TensorProtocol) -> Any:
    """A tensor where it lies in memory; the runtime does not look whether its rows follow each other."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(tensor.numpy()), int(tensor.dtype))


def _spec(port: Any) -> TensorSpec:
    """The description of one input or output by the runtime, whose type reads `tensor(int64)`."""
    short = port.type.removeprefix("tensor(").removesuffix(")")
    dtype = ir.DataType[{"float": "FLOAT", "double": "DOUBLE"}.get(short, short.upper())]
    shape = tuple(dim if isinstance(dim, int | str) else f"dim_{index}" for index, dim in enumerate(port.shape))
    return TensorSpec(port.name, dtype, shape, guess_role(port.name, dtype))
