"""TensorRT: a strongly typed `model.onnx` of standard operators, `build.json` and `build.py`, written on any machine.

The plan is built where it will run: `python build.py` in the engine's folder. Precision comes from the types in the
graph (networks are always strongly typed since TensorRT 11, and are asked to be on 10); no builder flag decides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Le, Len
from pydantic import AfterValidator

from planish.backends.tensorrt.emit import refuse_foreign, write_build
from planish.backends.tensorrt.presets import PRESETS
from planish.optimizer.errors import CheckFailed, MissingRuntime
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.interfaces.recipe import Recipe
from planish.optimizer.ir import onnx_io
from planish.optimizer.ir.program import Program

_LONGEST = 512


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if list(sizes) != sorted(sizes):
        raise ValueError("sizes must ascend: smallest, most usual, largest")
    return sizes


Range = Annotated[tuple[Annotated[int, Ge(1), Le(1_000_000)], ...], Len(3, 3), AfterValidator(_ascending)]
"""Smallest, most usual and largest size of an axis."""


@dataclass(frozen=True)
class TensorRt(Backend):
    """TensorRT 10.15 or later."""

    name: ClassVar[str] = "tensorrt"
    distribution: ClassVar[str] = "tensorrt"
    model_file: ClassVar[str] = "model.onnx"
    presets: ClassVar[Mapping[str, Sequence[Recipe]]] = PRESETS

    batch: Range = (1, 1, 8)
    """Smallest, most usual and largest number of examples that the plan shall take."""

    sequence: Range = (1, 128, _LONGEST)
    """Smallest, most usual and largest number of tokens; cut to what the model takes."""

    def emit(self, program: Program, folder: Path) -> None:
        """Write the graph, the build's settings and the script that builds the plan."""
        if len(program.components) > 1:
            raise CheckFailed(
                f"this version writes TensorRT engines of one component, this program has {len(program.components)}",
                where=f"target {self}",
                advice="choose another target for encoder-decoders",
            )
        model, signature = program.sole()
        refuse_foreign(model)
        onnx_io.save(model, folder / self.model_file)
        write_build(self.model_file, folder, signature, self.batch, self.sequence)

    def open(self, path: Path) -> Engine:
        """Say what is missing: plans are built by `build.py` where they run, and this version does not run them."""
        raise MissingRuntime(
            self.missing() or "", where=path, advice="build the plan there with build.py and run it with trtexec"
        )

    @classmethod
    def missing(cls) -> str | None:
        """No package, no GPU, or no runner: the first that applies."""
        try:
            import tensorrt  # noqa: F401
        except (ImportError, OSError) as error:
            return f"the TensorRT runtime is not installed ({error}); pip install 'planish[gpu]' where an NVIDIA GPU is"
        import torch

        if not torch.cuda.is_available():
            return "there is no NVIDIA GPU that torch can use"
        return "this version of planish emits TensorRT engines and does not run them"
