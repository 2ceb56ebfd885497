"""Planish: a compiler for trained Transformers. The names below are the public interface.

They are imported when they are first used: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's Linux wheels write a device id and look up a telemetry host when they are imported;
# `disable_telemetry_events()` comes too late (onnxruntime 1.31, Privacy.md). Child processes inherit the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from planish.optimizer.backend import Backend, Engine
    from planish.optimizer.base import Pass, PassResult, Refusal
    from planish.optimizer.benching import bench
    from planish.optimizer.compare import Budget, Comparison
    from planish.optimizer.driver import Result, optimize
    from planish.optimizer.errors import PlanishError
    from planish.optimizer.generate import Decoding, Sampling
    from planish.optimizer.loading import LoadedModel, load
    from planish.optimizer.pipeline import Pipeline
    from planish.optimizer.program import Program, Signature
    from planish.optimizer.stages import Progress
    from planish.optimizer.verifying import verify

_HOMES = {
    "Backend": "backend",
    "Budget": "compare",
    "Comparison": "compare",
    "Decoding": "generate",
    "Engine": "backend",
    "LoadedModel": "loading",
    "Pass": "base",
    "PassResult": "base",
    "Pipeline": "pipeline",
    "PlanishError": "errors",
    "Program": "program",
    "Progress": "stages",
    "Refusal": "base",
    "Result": "driver",
    "Sampling": "generate",
    "Signature": "program",
    "bench": "benching",
    "load": "loading",
    "optimize": "driver",
    "verify": "verifying",
}

__all__ = [
    "Backend",
    "Budget",
    "Comparison",
    "Decoding",
    "Engine",
    "LoadedModel",
    "Pass",
    "PassResult",
    "Pipeline",
    "PlanishError",
    "Program",
    "Progress",
    "Refusal",
    "Result",
    "Sampling",
    "Signature",
    "bench",
    "load",
    "optimize",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home; `__version__` is read from the installed distribution."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("planish")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
