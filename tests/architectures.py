"""Every architecture that generates or sees, beside PyTorch: `python -m tests.architectures` writes a page of them."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.optimizer import optimize
from planish.optimizer.output.manifest import Manifest
from tests.clocks import all_faster
from tests.zoo import GENERATORS, IMAGES, Species, build

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TARGETS = ("onnxruntime", "openvino")
_HEAD = """# Architectures

Text encoders of any architecture that takes token ids can be built; `tests/zoo.py` lists those under test. This page
lists the decoders, encoder-decoders and vision encoders.

## Text generation

Tiny checkpoints with random weights and odd sizes, built with the preset `exact` and compared with PyTorch. `prefill` is
the largest relative error of a component's scores and caches over single calls (empty, short and long pasts, padded
batches). `steps` is the Kullback-Leibler divergence of the next token over 16 steps on the engine's own cache, with
batch rows reordered in the middle. Greedy tokens are equal in all rows. Written by `python -m tests.architectures`; the
tests check every row again. `make interop` loads the same engines with optimum's `ORTModelFor…` and `OVModelFor…` and compares
greedy and beam-search tokens with PyTorch's.

| architecture | task | components | onnxruntime: prefill | steps | openvino: prefill | steps |
|---|---|---|---|---|---|---|
"""


_IMAGES = """
## Vision

Built and compared in the same way; the figure is the largest relative error of the output, over batches of one and of
several images. Height, width and channels are those of the checkpoint.

| architecture | task | image | onnxruntime | openvino |
|---|---|---|---|---|
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


def built(species: Species, folder: Path) -> Manifest:
    """The manifest of engines for both CPU targets."""
    checkpoint = build(species, folder / "checkpoint")
    return optimize(checkpoint, folder / "out", task=species.task, targets=TARGETS, clock=all_faster).manifest


def unharmed(manifest: Manifest) -> bool:
    """Whether every engine is what the passes made, none of which was undone; they may make the plain engine's files."""
    made = [
        one.shipped == "optimized" or one.why == "the same files as the plain lowering"
        for one in manifest.targets.values()
    ]
    return all(made) and not any(target.rolled_back for target in manifest.targets.values())


def examine(species: Species, folder: Path) -> Row:
    """Build engines for both CPU targets, without timing them, and read off the manifest how close they are."""
    manifest = built(species, folder)
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
        all(metrics["greedy"] == 1 for metrics in steps.values()) and unharmed(manifest),
    )


@dataclass(frozen=True)
class Sight:
    """What was found of an architecture that sees."""

    name: str
    task: str
    image: tuple[int | str, ...]
    """Channels, height, width."""
    errors: dict[str, float]
    green: bool

    def __str__(self) -> str:
        """A row of the table."""
        image, figures = " x ".join(map(str, self.image)), " | ".join(f"{self.errors[t]:.1e}" for t in TARGETS)
        return f"| {self.name} | {self.task} | {image} | {figures} |"


def look(species: Species, folder: Path) -> Sight:
    """Build engines of an encoder of images, without timing them, and read off the manifest how close they are."""
    manifest = built(species, folder)
    (image,) = manifest.signatures["model"].inputs
    errors = {
        name: max(metrics["max_rel"] for metrics in target.comparison.values())
        for name, target in manifest.targets.items()
    }
    return Sight(species.model_type, species.task, tuple(image.shape[1:]), errors, unharmed(manifest))


def listed() -> set[tuple[str, str]]:
    """Architectures and tasks in the tables of the page."""
    return set(re.findall(r"^\| ([\w-]+) \| ([a-z0-9]+-[a-z0-9-]+) ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def _rows(examined: Callable[[Species, Path], Row | Sight], zoo: Sequence[Species]) -> str:
    """The rows of a table; SystemExit if one is not green."""
    rows = []
    for species in zoo:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examined(species, Path(folder)))
        print(rows[-1], file=sys.stderr)
        if not rows[-1].green:
            raise SystemExit(f"{species.name} is not as PyTorch is")
    return "\n".join(map(str, rows)) + "\n"


def main() -> None:
    """Examine all of them and write the page."""
    PAGE.write_text(_HEAD + _rows(examine, GENERATORS) + _IMAGES + _rows(look, IMAGES), encoding="utf-8")


if __name__ == "__main__":
    main()
