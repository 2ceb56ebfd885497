"""Reference inputs and outputs, with which every engine is compared.

Inputs are generated from the signature (several lengths, a padded batch, batch 1, the longest length) or given. Outputs
come from the original model. The noise floor is the difference between the original in single and in double precision
on the short cases; the tolerances of exact rewrites are multiples of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planish.optimizer.errors import BadInput
from planish.optimizer.fidelity.budget import Budget, Clause
from planish.optimizer.fidelity.metrics import CACHE, compare
from planish.optimizer.ir.program import Role, Signature
from planish.optimizer.runtime.cases import BEST, NEXT, Case, load_cases, save_cases
from planish.optimizer.runtime.teacher_forcing import GreedyContinuation, load_continuations, save_continuations

NOISE_FACTOR = 64.0
"""Tolerance of an exact rewrite in noise floors: it changes the order of summation in every layer, runs in other
kernels, and on inputs on which the floor was not measured."""
NOISE_MINIMUM = 2.0**-22
"""Minimum of the noise floor (two units in the last place of float32)."""
_CONTINUATIONS = "continuations.safetensors"


@dataclass(frozen=True)
class Reference:
    """Cases, the original's outputs for them, and its noise floor by output."""

    inputs: tuple[Case, ...]
    outputs: tuple[Case, ...]
    noise: Mapping[str, float]
    """Largest relative difference between the original in float32 and in double precision."""
    origin: str
    """Origin of the outputs."""

    def exact_budget(self) -> Budget:
        """Tolerance of an exact rewrite: a multiple of the largest noise floor."""
        floor = max([*self.noise.values(), NOISE_MINIMUM])
        return Budget((Clause("max_rel", "<=", float(f"{NOISE_FACTOR * floor:.2e}")),))

    def save(self, folder: Path) -> None:
        """Write `inputs.safetensors` and `outputs.safetensors` into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_cases(self.inputs, folder / "inputs.safetensors")
        save_cases(self.outputs, folder / "outputs.safetensors")

    @classmethod
    def load(cls, folder: Path, noise: Mapping[str, float], origin: str) -> Reference:
        """Read the files of `save`; BadInput if they are missing or invalid."""
        inputs, outputs = (tuple(load_cases(folder / f"{kind}.safetensors")) for kind in ("inputs", "outputs"))
        measured = noise.keys() - {CACHE}
        # Only outputs that are kept in part have what metrics need of whole rows.
        names = [{name for name in case if not name.endswith((BEST, NEXT))} for case in outputs]
        whole = all(measured <= each == names[0] for each in names)
        if not inputs or len(inputs) != len(outputs) or not whole:
            raise BadInput(
                f"its {len(inputs)} inputs and {len(outputs)} outputs do not belong together, or some of "
                f"{', '.join(sorted(measured))} are missing",
                where=folder,
                advice="build it again",
            )
        return cls(inputs, outputs, noise, origin)


@dataclass(frozen=True)
class References:
    """The reference of a program: one for each component, and continuations of prompts."""

    components: Mapping[str, Reference]
    continuations: tuple[GreedyContinuation, ...] = ()
    """Empty for a program that does not generate."""

    def save(self, folder: Path) -> None:
        """Write the reference of each component, and `continuations.safetensors` if there are any."""
        for name, reference in self.components.items():
            reference.save(_place(folder, name))
        if self.continuations:
            save_continuations(self.continuations, folder / _CONTINUATIONS)

    @classmethod
    def load(cls, folder: Path, noise: Mapping[str, Mapping[str, float]], origin: str) -> References:
        """Read the files of `save`; BadInput if they are missing or invalid."""
        path = folder / _CONTINUATIONS
        components = {name: Reference.load(_place(folder, name), floors, origin) for name, floors in noise.items()}
        return cls(components, tuple(load_continuations(path)) if path.is_file() else ())


def _place(folder: Path, component: str) -> Path:
    """The folder of a component's reference; a subfolder if there are several components."""
    return folder if component == "model" else folder / component


def noise_floor(
    signature: Signature, inputs: Sequence[Case], outputs: Sequence[Case], precise: Sequence[Case] | None
) -> dict[str, float]:
    """Relative difference of each output from its double-precision value, at least the minimum."""
    if precise is None:
        return {tensor.name: 8 * NOISE_MINIMUM for tensor in signature.outputs if tensor.role is not Role.CACHE}
    differences = compare(signature, inputs, precise, outputs).outputs
    # Three digits: the floor is part of the manifest, and its last digits depend on the machine.
    noise = {name: max(float(f"{metrics['max_rel']:.2e}"), NOISE_MINIMUM) for name, metrics in differences.items()}
    # Some models give NaN in double precision; a floor of infinity would accept every engine.
    return {name: value if np.isfinite(value) else 8 * NOISE_MINIMUM for name, value in noise.items()}
