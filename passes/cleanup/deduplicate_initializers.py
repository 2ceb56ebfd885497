"""Store equal constants once.

Before:  y = Add (x, a);  r = Add (y, b)          with a = b = {1.0, 2.0}
After:   y = Add (x, a);  r = Add (y, a)
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
from annotated_types import Ge

from planish.optimizer.interfaces.pass_base import Pass, PassResult
from planish.optimizer.ir.lazy_tensors import origin_of


@dataclass(frozen=True)
class DeduplicateInitializers(Pass):
    """Share initializers of equal type, shape and content; the first name is kept.

    Weights that are references are equal if they have the same origin, and are not read. Others are compared by their
    SHA-256 up to ``limit`` bytes.
    """

    name: ClassVar[str] = "deduplicate-initializers"

    limit: Annotated[int, Ge(0)] = 1 << 30
    """Maximum size in bytes of constants that are compared by content."""

    def call(self, model: ir.Model) -> PassResult:
        """Replace every repeated initializer of each graph by the first one."""
        sites = [site for graph in model.graphs() for site in self._deduplicate(graph)]
        return PassResult(model, bool(sites), sites=sites)

    def _deduplicate(self, graph: ir.Graph) -> list[str]:
        first: dict[Hashable, ir.Value] = {}
        repeated: list[str] = []
        for name, value in list(graph.initializers.items()):
            key = self._key(value)
            # The value of an input is only its default, and an output must keep its name.
            if key is None or value.is_graph_output() or value.is_graph_input():
                continue
            if key in first:
                ir.convenience.replace_all_uses_with(value, first[key])
                del graph.initializers[name]
                repeated.append(f"initializer {name!r}")
            first.setdefault(key, value)
        return repeated

    def _key(self, value: ir.Value) -> Hashable | None:
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.STRING:
            return None
        content: object = origin_of(tensor)
        if content is None:
            if tensor.nbytes > self.limit:
                return None
            # Content is compared only without an origin: references are not read.
            content = hashlib.sha256(tensor.tobytes()).hexdigest()
        return (tensor.dtype, tuple(tensor.shape), repr(content))
