"""One component of a checkpoint: how it is called, and its way from a module without weights to a graph with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.optimizer.errors import BadInput
from planish.optimizer.ir.kv_cache import PAST
from planish.optimizer.ir.program import SUM, Axis, Role, Signature, TensorSpec, guess_role
from planish.optimizer.lowering.checkpoint.checkpoint import Binding, Checkpoint, initial, quiet, tensors_of
from planish.optimizer.lowering.checkpoint.failures import told_as_bad_input
from planish.optimizer.lowering.components.calls import CALLS
from planish.optimizer.lowering.export import torch_export as exporter
from planish.optimizer.lowering.export.layer_stacks import cut, find_stacks, grow

_SAMPLE = {"batch": 2, "choices": 3, "sequence": 16, "encoder_sequence": 11, PAST: 7}
"""Sizes of the traced inputs: all above one and all different, so that none is taken for another."""


@dataclass(frozen=True)
class Component:
    """A graph to make: its name, the call that it stands for (of `calls.CALLS`), its inputs and outputs."""

    name: str
    call: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    """Every tensor that the call gives, if there are none."""
    role: Role
    """What the outputs mean that are not of the cache."""
    left_out: tuple[str, ...] = ()
    """Tensors that the traced call gave as well."""


Describe = Callable[[Any, Checkpoint], Component]
"""Makes the component of a module, whose stacks of layers may be cut."""


def lower_component(
    model: Any, describe: Describe, binding: Binding, checkpoint: Checkpoint
) -> tuple[Component, ir.Model, Signature]:
    """Trace one component, bind its weights by reference, and read its signature off the graph."""
    component, graph, ranges = _trace(model, describe, checkpoint)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    used = exporter.parameters_of(graph)
    binding.refuse_absent(used, model, checkpoint)
    computed = _computed(model, used & (parameters - binding.stored.keys() - binding.absent))
    exporter.adopt_weights(graph, tensors_of(binding.stored) | computed, parameters)
    exporter.fold_stored_transposes(graph)
    return component, graph, Signature(_used(component.inputs, graph), _outputs(graph, component.role), ranges)


def _trace(model: Any, describe: Describe, checkpoint: Checkpoint) -> tuple[Component, ir.Model, dict[str, Axis]]:
    """Export the model, by way of its first layers if the others are copies of them.

    A model that mixes its parameters with tensors it makes on the CPU does not trace on the meta device: it gets memory
    that nobody writes or reads, which costs addresses only; one that generates gets it at once, for its cache is found
    by running it. One that counts its layers is traced whole.
    """
    folder = checkpoint.folder
    stacks = find_stacks(model, sharing=model.can_generate())
    for cuts in [stacks, []] if stacks else [[]]:
        for addresses in (True,) if model.can_generate() else (False, True):
            with cut(model, cuts) if cuts else nullcontext():
                if addresses:
                    _give_addresses(model)
                try:
                    with told_as_bad_input(f"{type(model).__name__} cannot be called as it is configured", folder):
                        component = describe(model, checkpoint)
                    sample = exporter.to_torch(sample_of(component.inputs))
                    axes = {
                        t.name: {i: d for i, d in enumerate(t.shape) if isinstance(d, str)} for t in component.inputs
                    }
                    graph, ranges, given = exporter.export(
                        model, CALLS[component.call], sample, axes, component.outputs
                    )
                except BadInput as error:
                    failure = error
                    continue
            if all(grow(graph, stack) for stack in cuts):
                return replace(component, left_out=given.left_out), graph, ranges
    raise failure


def _give_addresses(model: Any) -> None:
    """Replace parameters on the meta device by uninitialized ones on the CPU, tied ones by one and the same."""
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                fresh = made.setdefault(
                    id(parameter), torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                )
                module._parameters[name] = fresh


def sample_of(inputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """Harmless values of the traced shape: token 1 everywhere, everything visible, first segment."""
    signature = Signature(inputs, ())
    found = {}
    for tensor in inputs:
        shape = signature.shape_of(tensor, _SAMPLE)
        fill = 1 if tensor.role in (Role.TOKENS, Role.MASK) else 0
        found[tensor.name] = np.full(shape, fill, tensor.numpy_dtype())
    return found


@contextmanager
def probing(model: Any, checkpoint: Checkpoint, failure: str | None = None) -> Iterator[None]:
    """Inside, the module runs on tensors without data, to see what comes out; afterwards it is as it was.

    BadInput says ``failure`` if it does not run: without one, that its cache holds something else than keys and values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        with torch.no_grad(), quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
        what = failure or f"the cache of {type(model).__name__} is not one of keys and values"
        raise BadInput(f"{what}: {exporter.cause_of(error)}", where=checkpoint.folder) from error
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _computed(model: Any, names: set[str]) -> dict[str, ir.TensorProtocol]:
    """Parameters that are in no checkpoint, for transformers computes them."""
    return {name: ir.tensor(np.array(initial(model, name).numpy()), name=name) for name in names}


def _used(inputs: tuple[TensorSpec, ...], graph: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs that something reads, in the order of the graph; the others are dropped from it as well.

    Those of a cache are read off the graph: layers that were not traced have brought their own.
    """
    for value in [value for value in graph.graph.inputs if not value.uses()]:
        graph.graph.inputs.remove(value)
    described = {tensor.name: tensor for tensor in inputs}
    return tuple(described.get(value.name or "") or border_spec(value, Role.CACHE) for value in graph.graph.inputs)


def _outputs(graph: ir.Model, role: Role) -> tuple[TensorSpec, ...]:
    def role_of(value: ir.Value) -> Role:
        guessed = guess_role(value.name or "", value.dtype or ir.DataType.FLOAT)
        return Role.CACHE if guessed is Role.CACHE else role

    return tuple(border_spec(value, role_of(value)) for value in graph.graph.outputs)


def border_spec(value: ir.Value, role: Role) -> TensorSpec:
    """Name, type and shape of a graph input or output; an axis without a name gets one from its place."""
    shape = tuple(
        dim if isinstance(dim, int) else (dim.value or f"{value.name}_{index}")
        for index, dim in enumerate(value.shape or ())
    )
    return TensorSpec(value.name or "", value.dtype or ir.DataType.FLOAT, shape, role)


def total(*axes: str) -> str:
    """The name of a dimension that is as long as several axes together."""
    return SUM.join(sorted(axes))


def limited(axes: Mapping[str, Axis], name: str, *limits: int | None) -> dict[str, Axis]:
    """The axes, one of them no longer than any of these limits."""
    known = [limit for limit in (*limits, axes[name].maximum) if limit is not None]
    return {**axes, name: replace(axes[name], maximum=min(known, default=None))}
