"""One component of a checkpoint: its call, and its lowering from a module without weights to a graph with weights."""

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
"""Sizes of the traced inputs: all above one and different, so that the trace does not unify axes."""


@dataclass(frozen=True)
class Component:
    """Description of a graph: its name, its call (of `calls.CALLS`), its inputs and outputs."""

    name: str
    call: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    """Names of the outputs; empty for all tensors of the call."""
    role: Role
    """Roles of the outputs without the cache."""
    left_out: tuple[str, ...] = ()
    """Further tensors of the traced call, which are not outputs."""


Describe = Callable[[Any, Checkpoint], Component]
"""Function that builds the component of a module, whose layer stacks may be cut."""


def lower_component(
    model: Any, describe: Describe, binding: Binding, checkpoint: Checkpoint
) -> tuple[Component, ir.Model, Signature]:
    """Trace one component, bind its weights by reference, and derive its signature from the graph."""
    component, graph, ranges = _trace(model, describe, checkpoint)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    used = exporter.parameters_of(graph)
    binding.refuse_absent(used, model, checkpoint)
    computed = _computed(model, used & (parameters - binding.stored.keys() - binding.absent))
    exporter.adopt_weights(graph, tensors_of(binding.stored) | computed, parameters)
    exporter.fold_stored_transposes(graph)
    return component, graph, Signature(_used(component.inputs, graph), _outputs(graph, component.role), ranges)


def _trace(model: Any, describe: Describe, checkpoint: Checkpoint) -> tuple[Component, ir.Model, dict[str, Axis]]:
    """Export the model, from its first layers if the others are copies of them.

    A model that mixes its parameters with new CPU tensors cannot be traced on the meta device. It gets memory that is
    never accessed, which costs address space only. A model that generates gets it at once, since its cache is
    determined by a run. A model that counts its layers is traced completely.
    """
    folder = checkpoint.folder
    stacks = find_stacks(model, sharing=model.can_generate())
    # Cheapest attempt first: cut and without memory, then with memory, then complete.
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
    """Replace parameters on the meta device by uninitialized CPU tensors; tied parameters stay tied."""
    import torch

    replacements: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                # By identity: tied parameters must stay one parameter, or the graph would hold two copies.
                fresh = replacements.setdefault(
                    id(parameter), torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                )
                module._parameters[name] = fresh


def sample_of(inputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """Valid values of the traced shape: token 1 everywhere, no padding, first segment."""
    signature = Signature(inputs, ())
    sample = {}
    for tensor in inputs:
        shape = signature.shape_of(tensor, _SAMPLE)
        fill = 1 if tensor.role in (Role.TOKENS, Role.MASK) else 0
        sample[tensor.name] = np.full(shape, fill, tensor.numpy_dtype())
    return sample


@contextmanager
def probing(model: Any, checkpoint: Checkpoint, failure: str | None = None) -> Iterator[None]:
    """Run the module on tensors without data in the block, to inspect its results; it is restored afterwards.

    BadInput with ``failure`` if it does not run; without ``failure``, that its cache holds other things than keys and
    values.
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
            # A trial run may update buffers (RoPE frequencies) with tensors without data.
            module._buffers.update(buffers)


def _computed(model: Any, names: set[str]) -> dict[str, ir.TensorProtocol]:
    """Parameters that no checkpoint holds, since transformers computes them."""
    return {name: ir.tensor(np.array(initial(model, name).numpy()), name=name) for name in names}


def _used(inputs: tuple[TensorSpec, ...], graph: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs that the graph reads, in its order; others are removed from the graph.

    Cache inputs are taken from the graph, since copied layers added theirs.
    """
    # The exporter keeps unused inputs; runtimes would require a value for them.
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
    """Name, type and shape of a graph input or output; an unnamed axis gets a name from its position."""
    shape = tuple(
        dim if isinstance(dim, int) else (dim.value or f"{value.name}_{index}")
        for index, dim in enumerate(value.shape or ())
    )
    return TensorSpec(value.name or "", value.dtype or ir.DataType.FLOAT, shape, role)


def total(*axes: str) -> str:
    """The name of a dimension that is the sum of several axes."""
    return SUM.join(sorted(axes))


def limited(axes: Mapping[str, Axis], name: str, *limits: int | None) -> dict[str, Axis]:
    """The axes, with the maximum of one axis limited."""
    finite = [limit for limit in (*limits, axes[name].maximum) if limit is not None]
    return {**axes, name: replace(axes[name], maximum=min(finite, default=None))}
