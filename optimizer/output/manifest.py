"""Manifest of an output: `planish.json`. It is equal for equal builds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from planish.optimizer.errors import BadInput, UsageError, first_fault
from planish.optimizer.fidelity.budget import Budget
from planish.optimizer.fidelity.metrics import Comparison
from planish.optimizer.fidelity.parts import Parts
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend
from planish.optimizer.ir.program import SUM, Axis, Program, Role, Signature, TensorSpec
from planish.optimizer.lowering.components.tasks import misfit
from planish.optimizer.pipeline.pipeline import PassReport
from planish.optimizer.runtime.tokenization import TokenizerRecord
from planish.optimizer.system.json_files import read_json
from planish.optimizer.system.links import refuse_links_out
from planish.optimizer.system.staging import MANIFEST, MEASURED

_LONGEST_NAME, _LONGEST_PATH = 255, 4000
"""Maximum bytes of names and paths in common file systems."""
_GREATEST = 1 << 40
"""Upper bound of axes, bounds and byte counts; larger tensors do not fit any memory."""


def _element_type(name: str) -> str:
    import onnx_ir as ir

    if name not in ir.DataType.__members__ or name == "UNDEFINED":
        raise ValueError(f"{name!r} is not an element type of ONNX")
    return name


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) or len(name) > _LONGEST_NAME:
        raise ValueError("this is not the name of an engine or a component")
    return name


def _inner_path(name: str) -> str:
    """A path relative to the output, and inside of it."""
    parts = name.split("/")
    long = len(name.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in parts)
    if long or "\0" in name or not all(parts) or {".", ".."} & set(parts):
        raise ValueError("this is not the path of a file of this output")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
InnerPath = Annotated[str, AfterValidator(_inner_path)]
Size = Annotated[int, Field(ge=0, le=_GREATEST)]


class Record(BaseModel):
    """Base of all records. Unknown fields are refused, so that manifests of other versions are detected.

    Readers rely on the declared types, since a folder may be untrusted. Infinite figures are written as text, since
    JSON has no such numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TensorRecord(Record):
    """One input or output of a component."""

    name: str
    dtype: Annotated[str, AfterValidator(_element_type)]
    shape: list[Size | str]
    role: Role
    bound: Annotated[int, Field(ge=1, le=_GREATEST)] | None = None
    pad: Annotated[int, Field(ge=-_GREATEST, le=_GREATEST)] = 0


class AxisRecord(Record):
    """A dynamic axis and its supported sizes."""

    minimum: Size
    maximum: Size | None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"the maximum {self.maximum} is less than the minimum {self.minimum}")
        return self


class SignatureRecord(Record):
    """Inputs, outputs and axes of a component."""

    inputs: Annotated[list[TensorRecord], Field(min_length=1)]
    outputs: Annotated[list[TensorRecord], Field(min_length=1)]
    axes: dict[str, AxisRecord]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        axes = {axis for t in self.inputs for dim in t.shape if isinstance(dim, str) for axis in dim.split(SUM)}
        if axes - self.axes.keys():
            raise ValueError(f"the axis {min(axes - self.axes.keys())!r} of an input is not among the axes")
        return self

    @classmethod
    def of(cls, signature: Signature) -> SignatureRecord:
        """The record of a signature."""
        return cls(
            inputs=[_tensor_record(tensor) for tensor in signature.inputs],
            outputs=[_tensor_record(tensor) for tensor in signature.outputs],
            axes={name: AxisRecord(minimum=a.minimum, maximum=a.maximum) for name, a in signature.axes.items()},
        )

    def signature(self) -> Signature:
        """The recorded signature."""
        return Signature(
            tuple(map(_tensor, self.inputs)),
            tuple(map(_tensor, self.outputs)),
            {name: Axis(name, axis.minimum, axis.maximum) for name, axis in self.axes.items()},
        )


class SourceRecord(Record):
    """The source of the program."""

    kind: str
    architecture: str
    files: dict[str, str]
    notes: list[str]


class ReferenceRecord(Record):
    """Origin and precision of the reference outputs."""

    mode: Literal["full", "offload", "none"]
    passes: str
    """The check of single passes."""
    origin: str
    inputs: str
    calibrated_on: str
    """Origin of the calibration data."""
    noise: dict[Name, dict[str, Annotated[float, Field(ge=0)]]]
    """Noise floors by component and output."""
    exact_budget: dict[str, str]
    """Budgets of exact passes by component."""


class PassRecord(Record):
    """The result of one pass."""

    component: str
    text: str
    modified: bool
    sites: int
    refusals: list[str]
    facts: dict[str, float | int | str]
    nodes: tuple[int, int]
    weight_bytes: tuple[int, int]
    difference: dict[str, dict[str, float]] | None

    @classmethod
    def of(cls, component: str, report: PassReport) -> PassRecord:
        """The record of a pass report; refusals with equal reason are counted."""
        return cls(
            component=component,
            text=report.text,
            modified=report.modified,
            sites=len(report.sites),
            refusals=_counted([f"{refusal.reason}" for refusal in report.refusals]),
            facts=report.facts,
            nodes=report.nodes,
            weight_bytes=report.weight_bytes,
            difference=None if report.comparison is None else figures(report.comparison),
        )


class RolledBack(Record):
    """A pass that was rolled back, with the reason."""

    component: str
    text: str
    reason: str


class LoaderRecord(Record):
    """The engine as loaders open it without options, on the machine of the build."""

    target: str
    comparison: dict[str, dict[str, float]]
    """Metrics by output; empty if the engine cannot be opened or does not run."""
    violations: list[str]
    """Violated conditions of the budget, or the reason why nothing was compared."""


class TargetRecord(Record):
    """One engine."""

    target: str
    """The target as text, in the arithmetic that was chosen."""
    arithmetic: str = "f32"
    """The type in which it computes float32 on the machine of the build."""
    shipped: Literal["optimized", "plain"]
    why: str
    pipelines: dict[str, str]
    """The passes applied to the engine, by component; empty for a plain one."""
    passes: list[PassRecord]
    rolled_back: list[RolledBack]
    budgets: dict[str, str]
    """Budgets by component."""
    checked_with: str
    comparison: dict[str, dict[str, float]]
    """Metrics of the shipped engine against the reference."""
    as_loaders_open: LoaderRecord | None = None
    """Result for loaders without options, if they use another precision."""
    size_bytes: int
    canonical_operators: dict[str, int] = {}
    """Number of nodes by operator over all components, after the shared passes and before legalization."""
    operators: dict[str, int] = {}
    """Number of nodes by operator of the graph that the target compiles."""

    def budget(self, component: str) -> Budget:
        """The budget of a component; BadInput if it is missing or invalid."""
        try:
            return Budget.parse(self.budgets[component].split())
        except (KeyError, UsageError) as error:
            raise BadInput(f"the budget of {component!r} cannot be read ({error})", where=MANIFEST) from None

    def budgets_of(self, parts: Iterable[str]) -> Parts[Budget]:
        """The budgets of these parts, by the names of `Parts`; BadInput if one is missing or invalid."""
        return Parts.of_names({part: self.budget(part) for part in parts})

    def asked(self) -> str:
        """All budgets as one text."""
        asked = {name: budget for name, budget in self.budgets.items() if budget}
        distinct = dict.fromkeys(asked.values())
        if len(distinct) == 1 and len(asked) == len(self.budgets):
            return next(iter(distinct))
        return "; ".join(f"{name}: {budget}" for name, budget in asked.items())


class Manifest(Record):
    """The record of an output, except for timings."""

    format: Literal[1] = 1
    planish: str
    libraries: dict[str, str]
    instruction_set: str
    source: SourceRecord
    task: str
    signatures: Annotated[dict[Name, SignatureRecord], Field(min_length=1)]
    """Signatures by component."""
    requested: dict[str, str]
    reference: ReferenceRecord
    targets: Annotated[dict[Name, TargetRecord], Field(min_length=1)]
    """Records by the name of the engine's folder."""
    files: dict[InnerPath, str]
    """SHA-256 of every other file except the measurements."""
    tokenizer: TokenizerRecord | None = None
    """Settings to read tokenizer.json without transformers; None if only transformers gives the same tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        components = set(self.signatures)
        if self.reference.noise and set(self.reference.noise) != components:
            raise ValueError(f"reference.noise is of {', '.join(self.reference.noise)}, not of the components")
        for name, record in self.targets.items():
            if record.target.partition("{")[0] != name:
                raise ValueError(f"targets.{name} is an engine of {record.target!r}")
            if self.reference.noise and not components <= set(record.budgets):
                raise ValueError(f"targets.{name}.budgets has none for {min(components - set(record.budgets))!r}")
        return self

    def backend(self, name: str) -> Backend:
        """The target of the engine called ``name``; BadInput if this installation lacks it or one of its options."""
        try:
            return registry.backend(self.targets[name].target)
        except UsageError as error:
            raise BadInput(f"targets.{name}.target: {error}", where=MANIFEST) from None

    def write(self, folder: Path) -> None:
        """Write `planish.json`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an output; BadInput if it is missing or of another version."""
        path = folder / MANIFEST
        if not path.is_file():
            raise BadInput(f"there is no {MANIFEST}", where=folder, advice="give a folder that planish optimize wrote")
        try:
            manifest = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise BadInput(first_fault(error), where=path, advice="build it again with this version") from None
        signatures = {name: record.signature() for name, record in manifest.signatures.items()}
        # Readers of the manifest choose code by task; a wrong task would fail far from here.
        wrong = misfit(manifest.task, manifest.source.kind, signatures)
        if wrong is not None:
            raise BadInput(f"task: {wrong}", where=path, advice="build it again with this version")
        return manifest


def target_at(path: Path) -> str:
    """The target that opens an engine folder or a file: as the manifest above it says, else as loaders without options
    do."""
    name = registry.target_of(path)
    folder = path if path.is_dir() else path.parent
    if (folder.parent / MANIFEST).is_file():
        targets = Manifest.read(folder.parent).targets
        if folder.name in targets:
            return targets[folder.name].target
    return str(registry.backend(name).arithmetics[0])


def engine_folder(folder: Path, name: str) -> Path:
    """The folder of an engine of the output ``folder``; BadInput if it is missing, or if a link in it leads outside."""
    place = folder / name
    if not place.is_dir():
        raise BadInput(f"there is no folder {name}", where=folder, advice=f"{MANIFEST} names it: build it again")
    if not place.resolve().is_relative_to(folder.resolve()):
        raise BadInput("this is a link to a place outside of the output", where=place, advice="put a copy there")
    refuse_links_out(place, folder)
    return place


def refuse_links_of(engine: Path) -> None:
    """Raise BadInput if a link in an engine's folder leads out of it and of its output."""
    refuse_links_out(engine, *([engine.parent] if (engine.parent / MANIFEST).is_file() else []))


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` except manifest and measurements, by relative path."""
    # Measurements differ between equal builds, and the manifest cannot hold its own hash.
    names = [name for name in names_below(folder) if name not in (MANIFEST, *MEASURED) and not name.startswith(".")]
    return {name: digest_of(folder / name) or "" for name in names}


def names_below(folder: Path, root: Path | None = None) -> list[str]:
    """Sorted paths of all files below ``folder``, relative to ``root`` (default: ``folder``)."""
    return [path.relative_to(root or folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file, or None if it is missing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_record(program: Program) -> SourceRecord:
    """The record of a program's provenance."""
    source = program.provenance
    return SourceRecord(
        kind=source.kind, architecture=source.architecture, files=dict(source.files), notes=list(source.notes)
    )


def figures(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Metrics with three digits, for manifest and tables."""
    return {name: dict(metrics) for name, metrics in comparison.rounded().outputs.items()}


def _counted(texts: list[str]) -> list[str]:
    # A deep model repeats each refusal once per layer.
    return [f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts)]


def _tensor_record(tensor: TensorSpec) -> TensorRecord:
    return TensorRecord(
        name=tensor.name,
        dtype=tensor.dtype.name,
        shape=list(tensor.shape),
        role=tensor.role,
        bound=tensor.bound,
        pad=tensor.pad,
    )


def _tensor(record: TensorRecord) -> TensorSpec:
    import onnx_ir as ir

    return TensorSpec(
        record.name, ir.DataType[record.dtype], tuple(record.shape), record.role, record.bound, record.pad
    )
