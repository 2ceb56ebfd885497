"""OpenVINO: `openvino_model.xml` and `openvino_model.bin`, compiled for the CPU device unless told otherwise.

The IR is written by OpenVINO's own ONNX frontend, so this backend needs the package to emit as well as to run.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer import onnx_io
from planish.optimizer.backend import Backend, Engine
from planish.optimizer.errors import BadInput, CheckFailed, MissingRuntime
from planish.optimizer.program import Program, TensorSpec, guess_role

_TYPES = {"f32": "FLOAT", "f64": "DOUBLE", "f16": "FLOAT16", "bf16": "BFLOAT16", "boolean": "BOOL"} | {
    f"{sign}{bits}": f"{'INT' if sign == 'i' else 'UINT'}{bits}" for sign in "iu" for bits in (4, 8, 16, 32, 64)
}


@dataclass(frozen=True)
class OpenVino(Backend):
    """OpenVINO through its Python binding."""

    name: ClassVar[str] = "openvino"
    distribution: ClassVar[str] = "openvino"
    model_file: ClassVar[str] = "openvino_model.xml"

    threads: Annotated[int, Ge(0)] = 0
    """Threads of one inference; 0 lets the runtime take one per core."""

    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    """The device that the model is compiled for."""

    precision: Literal["f32", "bf16", "f16"] = "f32"
    """Arithmetic of floating-point operators. The runtime's own default is bf16 on CPUs that have it, at a
    relative error near 2e-3; here it must be asked for."""

    def emit(self, program: Program, folder: Path) -> None:
        """Convert through ONNX and write the IR, weights as they are (never halved in silence)."""
        ov = self._import()
        model, _ = program.sole()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".openvino-") as scratch:
            source = Path(scratch) / "model.onnx"
            onnx_io.save(model, source)
            try:
                converted = ov.Core().read_model(str(source))
            except RuntimeError as error:
                raise CheckFailed(f"OpenVINO cannot convert the graph: {_first_line(error)}") from error
            _give_stable_names(converted)
            ov.save_model(converted, str(folder / self.model_file), compress_to_fp16=False)
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
        except RuntimeError as error:
            raise BadInput(f"OpenVINO refuses the model: {_first_line(error)}", where=file) from error
        return OpenVinoEngine(compiled)

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

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self.precision}
        return config | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})


class OpenVinoEngine(Engine):
    """A compiled model and one inference request."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self.inputs = tuple(map(_spec, compiled.inputs))
        self.outputs = tuple(map(_spec, compiled.outputs))

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self._request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            raise BadInput(f"OpenVINO cannot run these inputs: {_first_line(error)}") from error
        return {tensor.name: np.array(results[index]) for index, tensor in enumerate(self.outputs)}


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
    name = names[0] if names else port.get_node().get_friendly_name()
    dtype = ir.DataType[_TYPES[port.get_element_type().get_type_name()]]
    shape = tuple(
        dim.get_length() if dim.is_static else f"dim_{index}" for index, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(name, dtype, shape, guess_role(name, dtype))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
