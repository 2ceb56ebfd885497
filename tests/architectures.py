"""Every architecture that generates, beside PyTorch: `python -m tests.architectures` writes `docs/architectures.md`."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from planish.optimizer import optimize
from planish.optimizer.measure import Timing
from tests.zoo import GENERATORS, Species, build

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TARGETS = ("onnxruntime", "openvino")
_HEAD = """# Architectures that generate

Tiny checkpoints with random weights and odd sizes, built with the preset `exact` and compared with PyTorch: `prefill` is
the largest relative error of a component's scores and caches over single calls (empty, short and long pasts, padded
batches), `steps` the Kullback-Leibler divergence of the next token over 16 steps behind the engine's own cache, rows
reordered in the middle. Greedy tokens are the same everywhere. Written by `python -m tests.architectures`; the tests
check every row again. `make interop` loads the same engines with optimum's `ORTModelFor…` and `OVModelFor…` and compares
greedy and beam-search tokens with PyTorch's.

| architecture | task | components | onnxruntime: prefill | steps | openvino: prefill | steps |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What was found of one architecture."""

    name: str
    task: str
    components: tuple[str, ...]
    prefill: dict[str, float]
    steps: dict[str, float]
    green: bool

    def __str__(self) -> str:
        """A row of the table."""
        figures = " | ".join(f"{self.prefill[t]:.1e} | {self.steps[t]:.1e}" for t in TARGETS)
        return f"| {self.name} | {self.task} | {', '.join(self.components)} | {figures} |"


def examine(species: Species, folder: Path) -> Row:
    """Build engines for both CPU targets, without timing them, and read off the manifest how close they are."""
    checkpoint = build(species, folder / "checkpoint")
    untimed = [Timing(1, 1, 1, 1, 1), Timing(1, 2, 2, 2, 1)]
    with mock.patch("planish.optimizer.building.race", lambda *_: untimed):
        manifest = optimize(checkpoint, folder / "out", task=species.task, targets=TARGETS).manifest
    found = {name: target.comparison for name, target in manifest.targets.items()}
    parts = {
        name: [metrics for output, metrics in comparison.items() if not output.startswith("generation")]
        for name, comparison in found.items()
    }
    steps = {name: comparison["generation.next token"] for name, comparison in found.items()}
    return Row(
        species.model_type,
        species.task,
        tuple(manifest.signatures),
        {name: max(metrics["max_rel"] for metrics in own) for name, own in parts.items()},
        {name: metrics["kl"] for name, metrics in steps.items()},
        all(metrics["greedy"] == 1 for metrics in steps.values())
        and all(target.shipped == "optimized" and not target.rolled_back for target in manifest.targets.values()),
    )


def listed() -> set[str]:
    """Architectures in the table of the page."""
    return set(re.findall(r"^\| ([\w-]+) \| text", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def main() -> None:
    """Examine all of them and write the page."""
    rows = []
    for species in GENERATORS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(species, Path(folder)))
        print(rows[-1], file=sys.stderr)
        if not rows[-1].green:
            raise SystemExit(f"{species.name} is not as PyTorch is")
    PAGE.write_text(_HEAD + "\n".join(map(str, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
