"""Checkpoint, module or ONNX file in, `Program` out.

PyTorch and transformers are imported here and in `inference/`, inside functions, and nowhere else in the compiler.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planish.optimizer.errors import BadInput, UsageError
from planish.optimizer.ir.program import Program, leading_axis

if TYPE_CHECKING:
    from planish.optimizer.lowering.original.original import Original


_ALONE = threading.RLock()
"""One thread lowers at a time: a second one finds transformers half imported, and torch.export replaces functions of
PyTorch while it runs."""


@dataclass(frozen=True)
class Lowered:
    """A program, the original model for comparison, and the files that are copied beside its engines."""

    program: Program
    original: Original
    folder: Path | None = None
    """The folder of the companion files; None for a module."""
    companions: tuple[Path, ...] = field(default=())
    """Names of configuration and tokenizer files, relative to ``folder``."""
    rewritten: Mapping[Path, str] = field(default_factory=dict)
    """Replaced content of some of them."""

    def files(self) -> dict[str, Path]:
        """The files that were read, by their names in ``folder``."""
        return {} if self.folder is None else {name: self.folder / name for name in self.program.provenance.files}

    def with_fixed(self, sizes: Mapping[str, int]) -> Lowered:
        """The same with static sizes of these axes. UsageError if the program does not support them."""
        signatures = self.program.signatures
        known = {name: axis for signature in signatures.values() for name, axis in signature.axes.items()}
        first = leading_axis(next(iter(signatures.values())))
        for name, size in sizes.items():
            where = f"{name}={size}"
            if name not in known:
                there = f"there are: {', '.join(known) or 'none'}"
                raise UsageError(f"no input has an axis {name!r}", where=where, advice=there)
            if known[name].clamp(size) != size:
                raise UsageError(f"the model takes {known[name].span} along this axis", where=where)
            if self.program.generates and name != first:
                raise UsageError(
                    "this axis changes with every token that is written", where=where, advice=f"fix {first!r} only"
                )
        narrowed = {name: signature.with_fixed(sizes) for name, signature in signatures.items()}
        return replace(self, program=replace(self.program, signatures=narrowed))


def lower(
    source: str | Path | Any,
    task: str | None = None,
    *,
    sample_inputs: Mapping[str, Any] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    adapter: Path | None = None,
    background: bool = False,
    offload: bool = False,
    last_logits: bool = False,
) -> Lowered:
    """Lower a checkpoint folder, an `.onnx` file, or an `nn.Module` called with ``sample_inputs`` by keyword.

    ``dynamic_axes`` names the dynamic axes of a module's inputs. ``adapter`` is the folder of a PEFT adapter to merge
    into a checkpoint. With ``background``, another process loads the original of a checkpoint meanwhile. With
    ``offload``, the original is never loaded; its weights are read when they are used. With ``last_logits``, a decoder
    gives the scores after the last token only. Raises BadInput or UsageError.
    """
    if offload and not (isinstance(source, str | Path) and Path(source).suffix.lower() != ".onnx"):
        raise UsageError(
            "only the weights of a checkpoint folder can stay on the disk",
            where="--reference offload",
            advice="use full",
        )
    if adapter is not None and not adapter.exists():
        raise _absent(adapter, "the folder of an adapter")
    if adapter is not None and not (isinstance(source, str | Path) and Path(source).is_dir()):
        raise UsageError("an adapter is merged into a checkpoint folder", where="--adapter", advice="give its base")
    if last_logits and not (isinstance(source, str | Path) and Path(source).is_dir()):
        raise UsageError("only a checkpoint folder is lowered so", where="--logits last", advice="leave it out")
    if isinstance(source, str | Path) and (sample_inputs is not None or dynamic_axes is not None):
        raise UsageError("sample_inputs and dynamic_axes are for a module", where=source, advice="leave them out")
    if not isinstance(source, str | Path) and task is not None:
        raise UsageError("a module serves no named task", where=f"task {task!r}", advice="leave it out")
    if not isinstance(source, str | Path):
        with _ALONE:
            return _lower_module(source, sample_inputs, dynamic_axes or {})
    path = Path(source)
    kind: Literal["here", "background", "offload"] = "offload" if offload else "background" if background else "here"
    with _ALONE:
        if path.suffix.lower() == ".onnx" or path.is_file():
            return _lower_file(path, task)
        return _lower_folder(path, task, adapter, kind, last_logits=last_logits)


def _lower_folder(
    path: Path,
    task: str | None,
    adapter: Path | None,
    kind: Literal["here", "background", "offload"],
    *,
    last_logits: bool,
) -> Lowered:
    if not path.exists():
        raise _absent(path, "a checkpoint folder or an .onnx file")
    from planish.optimizer.lowering.checkpoint.checkpoint import open_checkpoint
    from planish.optimizer.lowering.checkpoint.quantized_weights import BESIDE, text_without_codes
    from planish.optimizer.lowering.checkpoint.weights import INDEX
    from planish.optimizer.lowering.components import lower_checkpoint

    checkpoint = open_checkpoint(path, task, adapter, last_logits=last_logits)
    program, original = lower_checkpoint.lower(checkpoint, kind)
    companions = tuple(checkpoint.companions())
    settings = text_without_codes(path / "config.json")
    rewritten = {} if settings is None else {Path("config.json"): settings}
    index = [name for name in (Path(INDEX), Path(BESIDE)) if (path / name).is_file()]
    return Lowered(_having_read(program, path, [*index, *companions]), original, path, companions, rewritten)


_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def _absent(path: Path, wanted: str) -> BadInput:
    """The error for a missing path. If it may be the id of a model on the hub, it shows the download command."""
    advice = f"give {wanted}"
    is_path = path.suffix == ".onnx" or (path.parent != Path() and path.parent.exists())
    if _HUB_ID.fullmatch(str(path)) and not is_path:
        fetch = f"hf download {path} --local-dir {path.name}"
        advice += f"; nothing is downloaded here: if this is an id on the Hugging Face hub, fetch it with `{fetch}`"
        advice += " and give that folder"
    return BadInput("there is no such file or folder", where=path, advice=advice)


def _lower_file(path: Path, task: str | None) -> Lowered:
    from planish.optimizer.lowering.checkpoint.checkpoint import companions_in
    from planish.optimizer.lowering.components.tasks import TASKS, resolve
    from planish.optimizer.lowering.export import onnx_file
    from planish.optimizer.runtime.sentence_modules import read_modules

    program, original = onnx_file.lower(path, None if task is None else resolve(task))
    outputs = [tensor.name for tensor in program.sole()[1].outputs]
    absent = [name for name in (TASKS[program.task].outputs if task is not None else ()) if name not in outputs]
    if absent:
        raise UsageError(
            f"this file has no output {absent[0]!r}", where=f"--task {task}", advice=f"it has: {', '.join(outputs)}"
        )
    if program.task == "feature-extraction":
        read_modules(path.parent)
    companions = tuple(companions_in(path.parent))
    return Lowered(_having_read(program, path.parent, companions), original, path.parent, companions)


def _having_read(program: Program, folder: Path, names: Iterable[Path]) -> Program:
    """The program with further source files in its provenance, since companion files are part of the output."""
    from planish.optimizer.lowering.checkpoint.checkpoint import sha256

    files = {name.as_posix(): sha256(folder / name) for name in names}
    return replace(program, provenance=replace(program.provenance, files={**program.provenance.files, **files}))


def _lower_module(module: Any, inputs: Mapping[str, Any] | None, axes: Mapping[str, Mapping[int, str]]) -> Lowered:
    from planish.optimizer.lowering.export import nn_module

    if not inputs or not callable(getattr(module, "state_dict", None)):
        raise BadInput(
            f"cannot lower a {type(module).__name__}" if inputs else "a module needs sample_inputs",
            advice="give an nn.Module and sample_inputs={name: tensor}",
        )
    program, original = nn_module.lower(module, inputs, axes)
    return Lowered(program, original)
