"""OpenVINO: `openvino_model.xml` and `openvino_model.bin`, compiled for the CPU device unless told otherwise.

The IR is written by OpenVINO's own ONNX frontend, so this backend needs the package to emit as well as to run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Le, MaxLen

from planish.backends.openvino.counters import operator_times
from planish.backends.openvino.emit import (
    drop_guards,
    give_stable_names,
    import_quietly,
    make_stateful,
    separate_attention_inputs,
    set_activation_group,
)
from planish.backends.openvino.engine import MOST_BUCKETS, PAGE, OpenVinoEngine, Size, of_size
from planish.backends.openvino.presets import PRESETS
from planish.optimizer.errors import BadInput, CheckFailed, MissingRuntime, in_one_line
from planish.optimizer.interfaces.backend import MOST_THREADS, Backend, Engine
from planish.optimizer.interfaces.counters import OperatorTime, Probe
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.annotations import ACTIVATION_GROUP
from planish.optimizer.ir.graph import FINITE_MASK
from planish.optimizer.ir.program import Arrays, Program, Role
from planish.optimizer.system.scratch import scratch_folder

PROPERTIES = "openvino_properties.json"
"""The file of properties that loaders must give to get what was checked."""


@dataclass(frozen=True)
class OpenVino(Backend):
    """OpenVINO through its Python binding."""

    name: ClassVar[str] = "openvino"
    distribution: ClassVar[str] = "openvino"
    model_file: ClassVar[str] = "openvino_model.xml"
    suffixes: ClassVar[tuple[str, ...]] = (".xml",)
    libraries: ClassVar[tuple[str, ...]] = ("openvino",)
    presets: ClassVar[Mapping[str, Sequence[Recipe]]] = PRESETS

    threads: Annotated[int, Ge(0), Le(MOST_THREADS)] = 0
    """Threads of one inference; 0 lets the runtime take one per core."""

    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    """The device that the model is compiled for."""

    precision: Literal["auto", "f32", "bf16", "f16", "default"] = "auto"
    """Arithmetic of floating-point operators. `default` is what loaders get that are given no options: bf16 on CPUs
    that have it, f16 on GPUs. No file can tell the runtime otherwise, so `openvino_properties.json` goes with all
    others. `auto` is f32; with the presets `fast` and `small` it is `default` where that keeps the budget."""

    cache: Literal["f32", "f16", "u8"] = "f32"
    """How a decoder keeps keys and values between its steps; u8 in groups, each with a scale. It is written into the
    file: every loader does it so."""

    buckets: Annotated[tuple[Size, ...], MaxLen(MOST_BUCKETS)] = ()
    """Texts and tokens, as `1x16`, for which the model is compiled a second time: calls of exactly this size run with
    shapes that are known, for the memory of another copy; all others run as ever. Not for models that keep a cache."""

    @property
    def rounds(self) -> bool:
        """Where arithmetic or the cache has fewer bits than 32."""
        return self.precision not in ("auto", "f32") or self.cache != "f32"

    @property
    def arithmetic(self) -> str:
        """The precision; with `default` that of the runtime for the device."""
        if self.precision == "default":
            return self._own_precision() or "f32"
        return "f32" if self.precision == "auto" else self.precision

    @property
    def arithmetics(self) -> tuple[Self, ...]:
        """The runtime's own arithmetic where that is another one than f32; behind it, f32."""
        if self.precision != "auto" or self._own_precision() in (None, "f32"):
            return (self,)
        return (replace(self, precision="default"), self)

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
                    drop_guards(converted, {n.name for n in model.graph if FINITE_MASK in n.metadata_props})
                    if len(program.components) == 1 and program.signatures[name].cached:
                        make_stateful(ov, converted, self.cache)
                    else:
                        caches = {t.name for t in program.signatures[name].inputs if t.role is Role.CACHE}
                        separate_attention_inputs(converted, caches)
                except RuntimeError as error:
                    raise CheckFailed(f"OpenVINO cannot convert the graph: {in_one_line(error)}") from error
                if ACTIVATION_GROUP in model.metadata_props:
                    set_activation_group(converted, model.metadata_props[ACTIVATION_GROUP])
                give_stable_names(converted)
                ov.save_model(converted, str(folder / self.file_of(name)), compress_to_fp16=False)
                del converted  # it maps the scratch file

    def open(self, path: Path) -> Engine:
        """Open an engine folder, an `.xml` or an `.onnx` file."""
        return self._compiled(self._import().Core(), self._file(path), self._config())

    def operator_times(self, path: Path, inputs: Arrays, calls: int) -> list[OperatorTime]:
        """From the runtime's performance counters."""
        if not self.has_counters:
            return super().operator_times(path, inputs, calls)
        core, file = self._import().Core(), self._file(path)
        engine = self._compiled(core, file, self._config() | {"PERF_COUNT": True})
        return operator_times(self._import(), engine, core.read_model(str(file)), inputs, calls)

    @property
    def has_counters(self) -> bool:
        """On the processor: elsewhere peaks are other ones, and counters tell when work was handed over."""
        return self.device == "CPU"

    @classmethod
    def probes(cls) -> Sequence[Probe]:
        """One for each arithmetic that the runtime takes by itself on this machine, f32, and 8 bits."""
        precision = cls()._own_precision()
        types = dict.fromkeys(["f32", *([precision] if precision else [])])
        return [
            *(Probe(each, f"openvino{{precision={each}}}") for each in types),
            Probe("i8", "openvino{precision=f32}"),
        ]

    def _file(self, path: Path) -> Path:
        file = path / self.model_file if path.is_dir() else path
        if not file.is_file():
            raise BadInput("there is no OpenVINO model here", where=file)
        return file

    def _compiled(self, core: Any, file: Path, config: Mapping[str, object]) -> OpenVinoEngine:
        if self.device not in {device.partition(".")[0] for device in core.available_devices}:
            raise MissingRuntime(f"OpenVINO finds no {self.device} on this machine", where=f"target {self}")
        try:
            compiled = core.compile_model(str(file), self.device, config)
            sizes = [tuple(map(int, text.split("x"))) for text in self.buckets]
            models = {size: of_size(core, file, size) for size in sizes}
            buckets = {size: core.compile_model(m, self.device, config) for size, m in models.items()}
        except RuntimeError as error:
            raise BadInput(f"OpenVINO refuses the model: {in_one_line(error)}", where=file) from error
        return OpenVinoEngine(self._import(), compiled, buckets)

    @classmethod
    def missing(cls) -> str | None:
        """Not installed, or broken; None if it imports."""
        try:
            import_quietly()
        except ImportError as error:
            return f"openvino does not import ({error}); pip install 'planish[cpu]'"
        return None

    def _import(self) -> Any:
        reason = self.missing()
        if reason is not None:
            raise MissingRuntime(reason, where="target openvino")
        return import_quietly()

    def as_loaders_open(self) -> Self | None:
        """With the runtime's own precision, where that is another one here."""
        if self.precision == "default" or self._own_precision() in (None, self.arithmetic):
            return None
        return replace(self, precision="default", threads=0, buckets=())

    def _own_precision(self) -> str | None:
        """The precision that the runtime takes for the device by itself; None if that cannot be told here."""
        if self.missing() is not None:
            return None
        core = import_quietly().Core()
        if self.device not in {device.partition(".")[0] for device in core.available_devices}:
            return None
        return str(core.get_property(self.device, "INFERENCE_PRECISION_HINT").get_type_name())

    def _write_properties(self, folder: Path, files: Sequence[str]) -> None:
        properties = self._precision()
        if properties:
            (folder / PROPERTIES).write_text(json.dumps(properties) + "\n", encoding="utf-8")
            calls = [f'{Path(name).stem} = core.compile_model("{name}", "{self.device}", properties)' for name in files]
            page = PAGE.format(properties=json.dumps(properties), calls="\n".join(calls))
            (folder / "README.md").write_text(page, encoding="utf-8")

    def _precision(self) -> dict[str, object]:
        return {} if self.precision == "default" else {"INFERENCE_PRECISION_HINT": self.arithmetic}

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", **self._precision()}
        return config | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})
