"""The backend that runs graphs between passes, and engines whose own runtime is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.backend import Backend, Engine
from planish.optimizer.ir import onnx_io


def runner_of(target: Backend, mapped: bool = False) -> Backend:
    """The backend that runs an engine of ``target`` here: itself, or the interpreter; ``mapped`` if it can."""
    runner = target if target.missing() is None else registry.interpreter()
    return (runner.mapped() or runner) if mapped else runner


def load_mapped(model: ir.Model, place: Path) -> Engine:
    """Open a model whose weights stay in a file of the folder ``place``, which is written anew: it may not fit into
    memory."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    onnx_io.save(model, place / "model.onnx")
    interpreter = registry.interpreter()
    return (interpreter.mapped() or interpreter).open(place)
