"""Timing of any mix of outputs, `.onnx` and `.xml` files on the same inputs, and their rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer.compilation.progress import Progress, Stages, silent
from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.fidelity.inputs import default_shapes, refuse_other_sizes, sized_case
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.registry import target_of
from planish.optimizer.ir.program import Axis, Signature, TensorSpec
from planish.optimizer.output.manifest import Manifest, engine_folder, refuse_links_of, target_at
from planish.optimizer.runtime.worker import EngineRef
from planish.optimizer.system.staging import MANIFEST
from planish.optimizer.timing.interleaved import Timing, time_against_first
from planish.optimizer.timing.roofline import Roofline, roofline


@dataclass(frozen=True)
class Entrant:
    """One engine of a timing run: its label in the table, its location, its signature."""

    label: str
    engine: EngineRef
    signature: Signature
    component: str = "model"
    """Component; only engines of the same component are compared."""


@dataclass(frozen=True)
class BenchRow:
    """One engine at one shape."""

    label: str
    shape: str
    timing: Timing
    component: str = "model"


@dataclass(frozen=True)
class RooflineRow:
    """The roofline of one engine at one shape."""

    label: str
    shape: str
    roofline: Roofline
    component: str = "model"


def bench(
    models: Sequence[str | Path],
    against: Sequence[str | Path] = (),
    shapes: Sequence[Mapping[str, int]] = (),
    targets: Sequence[str] = (),
    *,
    progress: Progress = silent,
) -> list[BenchRow]:
    """Time every engine of ``models`` in alternation; the baseline is the first of ``against`` (or of ``models``).

    Components of an encoder-decoder are timed separately, each against the same component of other engines.

    ``targets`` give options to the runtimes (`onnxruntime{threads=2}`) and select the engines of an output, each once
    for every target of its runtime; by default all engines take part. BadInput if there is no engine to time,
    UsageError for unknown sizes or targets.
    """
    entrants = _of_all((*against, *models), targets)
    sizes = _sizes(entrants, shapes)
    stages = Stages(progress, sum(map(len, sizes.values())))
    return [row for name, group in _by_component(entrants).items() for row in _time(group, sizes[name], stages)]


def rooflines(
    models: Sequence[str | Path],
    shapes: Sequence[Mapping[str, int]] = (),
    targets: Sequence[str] = (),
    *,
    progress: Progress = silent,
) -> list[RooflineRow]:
    """The distance of each operator of every engine from what this machine can do; engines and sizes as in `bench`.

    BadInput for an engine whose runtime does not tell the time of single operators.
    """
    entrants = _of_all(models, targets)
    sizes = _sizes(entrants, shapes)
    stages = Stages(progress, sum(len(sizes[entrant.component]) for entrant in entrants))
    rows = []
    for entrant in entrants:
        for size in sizes[entrant.component]:
            case, text = sized_case(entrant.signature, size)
            with stages.stage(f"roofline of {entrant.label} at {text}"):
                rows.append(RooflineRow(entrant.label, text, roofline(entrant.engine, case), entrant.component))
    return rows


def _of_all(models: Sequence[str | Path], targets: Sequence[str]) -> list[Entrant]:
    """The engines of all models. BadInput if there are none, UsageError for a target that opens none of them."""
    entrants = [entrant for path in models for entrant in _entrants(Path(path), targets)]
    if not entrants:
        raise BadInput("there is no engine to time here", where=", ".join(map(str, models)))
    opened = {registry.backend(entrant.engine.target).name for entrant in entrants}
    # An option for a runtime that opens nothing here would have no effect, silently.
    idle = [text for text in targets if registry.backend(text).name not in opened]
    if idle:
        advice = f"there are engines of {', '.join(sorted(opened))}"
        raise UsageError("nothing here is opened with it", where=f"--target {idle[0]}", advice=advice)
    return entrants


def _by_component(entrants: Sequence[Entrant]) -> dict[str, list[Entrant]]:
    components = dict.fromkeys(entrant.component for entrant in entrants)
    return {name: [entrant for entrant in entrants if entrant.component == name] for name in components}


def _sizes(
    entrants: Sequence[Entrant], shapes: Sequence[Mapping[str, int]]
) -> Mapping[str, Sequence[Mapping[str, int]]]:
    """Component -> the sizes at which its engines run. UsageError for sizes of axes that no engine has."""
    refuse_other_sizes([entrant.signature for entrant in entrants], shapes)
    return {name: shapes or default_shapes(group[0].signature) for name, group in _by_component(entrants).items()}


def _time(entrants: Sequence[Entrant], shapes: Sequence[Mapping[str, int]], stages: Stages) -> list[BenchRow]:
    # All engines must get equal inputs, and only some signatures know the vocabulary size.
    bounds = {t.name: t.bound for e in entrants for t in e.signature.inputs if t.bound is not None}
    rows = []
    for sizes in shapes:
        # Equal seeds and bounds: every engine of a timing run gets the same values.
        cases = [sized_case(_bounded(entrant.signature, bounds), sizes) for entrant in entrants]
        with stages.stage(f"timing {entrants[0].component} at {cases[0][1]}"):
            timings = time_against_first([entrant.engine for entrant in entrants], [case for case, _ in cases])
        rows += [
            BenchRow(e.label, text, t, e.component) for e, (_, text), t in zip(entrants, cases, timings, strict=True)
        ]
    return rows


def _entrants(path: Path, targets: Sequence[str]) -> list[Entrant]:
    """The engines of an output, the engine of an engine folder, or the engine of a file."""
    targets_by_backend: dict[str, list[str]] = {}
    for text in targets:
        targets_by_backend.setdefault(registry.backend(text).name, []).append(text)
    if (path / MANIFEST).is_file():
        manifest = Manifest.read(path)
        names = [name for name in manifest.targets if not targets_by_backend or name in targets_by_backend]
        return [
            entrant
            for name in names
            if manifest.backend(name).missing() is None
            for entrant in _components(
                engine_folder(path, name), targets_by_backend.get(name, [manifest.targets[name].target]), manifest
            )
        ]
    refuse_links_of(path)
    target = target_of(path)
    variants = targets_by_backend.get(target, [target_at(path)])
    if path.is_dir() and (path.parent / MANIFEST).is_file():
        return _components(path, variants, Manifest.read(path.parent))
    signature = _signature_of(path, target)
    return [Entrant(_label(str(path), way, variants), EngineRef(way, path), signature) for way in variants]


def _label(name: str, target: str, variants: Sequence[str]) -> str:
    """The label of an engine in the table, with its options if it is opened with several."""
    return name if len(variants) == 1 else f"{name} {target}"


def _components(folder: Path, targets: Sequence[str], manifest: Manifest) -> list[Entrant]:
    """Every component of an engine folder, for each target."""
    return [
        Entrant(
            _label(str(folder) if len(manifest.signatures) == 1 else f"{folder} {component}", target, targets),
            EngineRef(target, registry.backend(target).path_of(component, folder)),
            record.signature(),
            component,
        )
        for component, record in manifest.signatures.items()
        for target in targets
    ]


def _signature_of(path: Path, target: str) -> Signature:
    """The signature from the manifest above an engine's file, else from the graph or the runtime."""
    above = path.parent.parent
    if (above / MANIFEST).is_file():
        backend = registry.backend(target)
        signatures = Manifest.read(above).signatures
        return next(record.signature() for name, record in signatures.items() if backend.file_of(name) == path.name)
    if path.suffix == ".onnx":
        from planish.optimizer.lowering.export.onnx_file import read_signature

        return read_signature(path)
    engine = registry.backend(target).open(path)
    return _named_axes(engine.inputs, engine.outputs)


def _named_axes(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Signature:
    """A signature for an engine without axis names: batch first, sequence second."""
    names = ("batch", "sequence")

    def named(tensor: TensorSpec) -> TensorSpec:
        shape = tuple(
            names[index] if isinstance(dim, str) and index < len(names) else dim
            for index, dim in enumerate(tensor.shape)
        )
        return TensorSpec(tensor.name, tensor.dtype, shape, tensor.role, tensor.bound, tensor.pad)

    renamed = tuple(map(named, inputs))
    used = {dim for tensor in renamed for dim in tensor.shape if isinstance(dim, str)}
    return Signature(renamed, outputs, {name: Axis(name) for name in sorted(used)})


def _bounded(signature: Signature, bounds: Mapping[str, int | None]) -> Signature:
    """The signature with bounds from other engines of the same timing run."""
    inputs = tuple(
        TensorSpec(t.name, t.dtype, t.shape, t.role, bounds.get(t.name) if t.bound is None else t.bound, t.pad)
        for t in signature.inputs
    )
    return Signature(inputs, signature.outputs, signature.axes)
