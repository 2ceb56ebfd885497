"""What loaders get of finished outputs, target x loader -> error: `python -m benchmarks.deployment OUT…`.

Each engine is held against the reference of its output twice: opened with the options of its target, and as loaders
open it that are given none (`InferenceSession`, ORTModel; `compile_model`, OVModel, in the runtime's own precision).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.record import record
from planish.optimizer.fidelity.engine_check import Fidelity, check_engines
from planish.optimizer.fidelity.reference import References
from planish.optimizer.interfaces import registry
from planish.optimizer.output.manifest import Manifest, engine_folder

COLUMNS = ("model", "task", "target", "opened", "largest relative error", "greedy tokens", "budget")
_LOADERS = {"onnxruntime": "InferenceSession, ORTModel", "openvino": "compile_model, OVModel"}


@click.command()
@click.argument("outs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(outs: Sequence[Path]) -> None:
    """Check the engines of each output in both ways on this machine."""
    rows, figures = [], []
    for out in outs:
        for row, figure in deployed(out):
            rows.append(row)
            figures.append(figure)
    record("deployment", "What loaders get of engines of the preset exact", COLUMNS, rows, figures, "deployment OUT…")


def deployed(out: Path) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """A row, and its figures, for each engine of an output and each way to open it."""
    manifest = Manifest.read(out)
    references = References.load(out / "reference", manifest.reference.noise, manifest.reference.origin)
    signatures = {component: recorded.signature() for component, recorded in manifest.signatures.items()}
    found: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for name, asked in manifest.targets.items():
        target = manifest.backend(name)
        default = target.as_loaders_open() or registry.backend(name)
        ways = {f"options of the target: {target}": target, f"{_LOADERS.get(name, 'no options')}: {default}": default}
        for how, opened in ways.items():
            fidelity = check_engines(opened, engine_folder(out, name), signatures, references)
            violations = fidelity.violations(asked.budgets_of(fidelity.comparisons.by_name()))
            error, greedy = _worst(fidelity), _greedy(fidelity)
            tokens = "" if greedy is None else f"{greedy:.1%}"
            held = "OUTSIDE" if violations else "held"
            row = (manifest.source.architecture, manifest.task, name, how, f"{error:.1e}", tokens, held)
            found.append((row, dict(zip(COLUMNS, (*row[:4], error, greedy, violations), strict=True))))
    return found


def _worst(fidelity: Fidelity) -> float:
    """The largest error of any output of any component, relative to the largest value of the reference."""
    components = fidelity.comparisons.components.values()
    return max(metrics["max_rel"] for component in components for metrics in component.outputs.values())


def _greedy(fidelity: Fidelity) -> float | None:
    """The share of tokens of continuations that are those of the original."""
    written = fidelity.comparisons.continuations
    return None if written is None else min(metrics["greedy"] for metrics in written.outputs.values())


if __name__ == "__main__":
    main()
