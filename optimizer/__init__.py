"""Planish: a compiler for trained Transformers. The names below are the public interface.

They are imported when they are first used: importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's Linux wheels write a device id and look up a telemetry host when they are imported;
# `disable_telemetry_events()` comes too late (onnxruntime 1.31, Privacy.md). Child processes inherit the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from planish.optimizer.compilation.options import BuildOptions
    from planish.optimizer.compilation.progress import Progress
    from planish.optimizer.compilation.result import Result
    from planish.optimizer.driver.bench import bench
    from planish.optimizer.driver.optimize import optimize
    from planish.optimizer.driver.verify import verify
    from planish.optimizer.errors import PlanishError
    from planish.optimizer.fidelity.budget import Budget
    from planish.optimizer.fidelity.metrics import Comparison
    from planish.optimizer.inference.loading import LoadedModel, load
    from planish.optimizer.interfaces.backend import Backend, Engine
    from planish.optimizer.interfaces.pass_base import Pass, PassResult, Refusal
    from planish.optimizer.ir.program import Program, Signature
    from planish.optimizer.pipeline.pipeline import Pipeline
    from planish.optimizer.runtime.generation import Decoding, Sampling

_HOMES = {
    "Backend": "interfaces.backend",
    "Budget": "fidelity.budget",
    "BuildOptions": "compilation.options",
    "Comparison": "fidelity.metrics",
    "Decoding": "runtime.generation",
    "Engine": "interfaces.backend",
    "LoadedModel": "inference.loading",
    "Pass": "interfaces.pass_base",
    "PassResult": "interfaces.pass_base",
    "Pipeline": "pipeline.pipeline",
    "PlanishError": "errors",
    "Program": "ir.program",
    "Progress": "compilation.progress",
    "Refusal": "interfaces.pass_base",
    "Result": "compilation.result",
    "Sampling": "runtime.generation",
    "Signature": "ir.program",
    "bench": "driver.bench",
    "load": "inference.loading",
    "optimize": "driver.optimize",
    "verify": "driver.verify",
}

__all__ = [
    "Backend",
    "Budget",
    "BuildOptions",
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


def __dir__() -> list[str]:
    """Public names that were not used yet are names of this package as well."""
    return sorted({*globals(), *__all__, "__version__"})
