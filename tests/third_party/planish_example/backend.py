"""A backend that runs engines with the reference evaluator of ONNX: slow, and everywhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from planish.optimizer import Backend, Engine, Program
from planish.optimizer.errors import BadInput, CheckFailed, in_one_line
from planish.optimizer.ir.program import TensorSpec, guess_role


@dataclass(frozen=True)
class Evaluator(Backend):
    """The reference evaluator of ONNX."""

    name: ClassVar[str] = "evaluator"
    distribution: ClassVar[str] = "onnx"
    model_file: ClassVar[str] = "evaluated_model.onnx"

    verbose: int = 0
    """How much it prints."""

    def emit(self, program: Program, folder: Path) -> None:
        if len(program.components) > 1:
            raise CheckFailed("only programs of one component are written", where=f"target {self}")
        model, _ = program.sole()
        ir.save(ir.external_data.load_to_model(model.clone()), folder / self.model_file)

    def open(self, path: Path) -> Engine:
        file = path / self.model_file
        if not file.is_file():
            raise BadInput("there is no engine here", where=file)
        return EvaluatorEngine(onnx.load(file), self.verbose)

    @classmethod
    def missing(cls) -> str | None:
        return None


class EvaluatorEngine(Engine):
    def __init__(self, proto: onnx.ModelProto, verbose: int) -> None:
        self._session = onnx.reference.ReferenceEvaluator(proto, verbose=verbose)
        self.inputs = tuple(map(_spec, proto.graph.input))
        self.outputs = tuple(map(_spec, proto.graph.output))

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        except Exception as error:  # whatever NumPy raises for shapes that do not fit
            raise BadInput(f"the evaluator cannot run these inputs: {in_one_line(error)}") from error


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    dtype = ir.DataType(value.type.tensor_type.elem_type)
    shape = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return TensorSpec(value.name, dtype, shape, guess_role(value.name, dtype))
