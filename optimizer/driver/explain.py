"""Sites of a pipeline on a model: `planish explain`."""

from __future__ import annotations

from pathlib import Path

from planish.optimizer.driver.opt import observing, steps_of, target_name
from planish.optimizer.errors import UsageError
from planish.optimizer.lowering import lower
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.output.sites import Rewritten, read_sites


def explain(
    source: Path,
    *,
    pipeline: str | None = None,
    preset: str | None = None,
    target: str | None = None,
) -> dict[str, Rewritten]:
    """The sites of every pass and the operator counts, by target: of an output, or of a trial run on an ONNX file.

    UsageError if a pipeline is given for an output. ``target`` selects an engine of an output; for a file it is the
    target of the preset, by default ONNX Runtime.
    """
    if source.is_dir():
        if pipeline is not None or preset is not None:
            raise UsageError("an output keeps what its own pipeline did", advice="give an .onnx file to try another")
        return _explain_output(source, target)
    name = target_name(target, pipeline)
    lowered = lower(source)
    outcome = steps_of(pipeline, preset, name).run(lowered.program.sole()[0], [observing(lowered)])
    return {name: Rewritten.of(name, {"model": outcome})}


def _explain_output(folder: Path, target: str | None) -> dict[str, Rewritten]:
    sites, manifest = read_sites(folder), Manifest.read(folder)
    if target is not None and target not in manifest.targets:
        advice = f"there are: {', '.join(manifest.targets)}"
        raise UsageError(f"this output has no engine {target!r}", where="--target", advice=advice)
    return {
        name: Rewritten(
            [record for record in sites if record.target == name],
            record.canonical_operators,
            record.operators,
        )
        for name, record in manifest.targets.items()
        if target in (None, name)
    }
