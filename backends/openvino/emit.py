"""Changes of an OpenVINO model before it is written: a stateful cache, stable names."""

from __future__ import annotations

import sys
from collections.abc import Set
from typing import Any

import numpy as np

from planish.backends.openvino.engine import BEAMS
from planish.optimizer.ir.kv_cache import PAST_NAME, PRESENT_NAME


def make_stateful(ov: Any, model: Any, cache: str) -> None:
    """Keep the cache inside the model: inputs `past_key_values.…` and outputs `present.…` become variables.

    The rows of the cache that a step reads are chosen by the input `beam_idx`, shape (batch,), as the ecosystem's
    loaders give it. What the cache is kept in is said in the file: the runtime's own default is 8 bits, in silence.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    pasts = [name for port in model.inputs for name in port.get_names() if name.startswith(PAST_NAME)]
    batch = model.input("input_ids").get_partial_shape()[0]
    beams = ops.parameter(ov.PartialShape([batch]), ov.Type.i32, name=BEAMS)
    beams.output(0).get_tensor().add_names({BEAMS})
    model.add_parameters([beams])
    for name in pasts:
        port = model.input(name)
        readers = port.get_target_inputs()
        chosen = ops.gather(port, beams, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: name.replace(PAST_NAME, PRESENT_NAME, 1) for name in pasts})
    _start_empty(ops, model)
    model.set_rt_info(cache, ["runtime_options", "KV_CACHE_PRECISION"])


def set_activation_group(model: Any, size: str) -> None:
    """Say in the file how many entries of an activation share a step, where weights are stored in integers.

    The CPU plugin rounds such activations to 8 bits by itself, 32 entries at a time unless the file says otherwise.
    """
    model.set_rt_info(size, ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def _start_empty(ops: Any, model: Any) -> None:
    """Initialize each variable with as many rows as there are texts, and no tokens."""
    shape = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0]), ops.constant(0))
    for operator in model.get_ops():
        if operator.get_type_name() == "ReadValue":
            dims = [dim.min_length for dim in operator.get_output_partial_shape(0)]
            rest = ops.constant(np.array(dims[1:], np.int64))
            zeros = ops.constant(0.0, dtype=operator.get_output_element_type(0))
            operator.set_arguments([ops.broadcast(zeros, ops.concat([batch, rest], axis=0))])
    model.validate_nodes_and_infer_types()


def drop_guards(model: Any, names: Set[str | None]) -> None:
    """Read attention as it is where the frontend replaces NaN in the results of these nodes, which have none."""
    for operator in model.get_ops():
        if operator.get_type_name() != "Select" or operator.get_friendly_name() not in names:
            continue
        test, result = operator.input_value(0).get_node(), operator.input_value(2)
        if test.get_type_name() == "IsNaN" and test.input_value(0) == result:
            for reader in operator.output(0).get_target_inputs():
                reader.replace_source_output(result)
    model.validate_nodes_and_infer_types()


_TOKENS = 2
"""The axis of tokens of keys and values: (batch, heads, tokens, size of a head)."""
_ATTENTION = frozenset({"ScaledDotProductAttention", "MatMul", "Multiply", "Transpose"})
"""Operators that read keys and values in an attention, written as one operator or out of several."""


def separate_attention_inputs(model: Any, caches: Set[str]) -> None:
    """Put a Reshape to the same shape behind each input of keys or values that an attention reads directly.

    In bfloat16 the CPU plugin keeps a graph input in float32 up to the attention and converts everything else before
    it, so two attentions differ in the types of their operands. It generates code for each of them, but remembers the
    shapes of equal attentions only once: with equal sizes the second one gets those of its previous call. It then fails
    ("SetLoadStoreScalar expects static shapes") or computes with the wrong lengths. Behind an operator, operands of all
    attentions are converted alike. Seen in OpenVINO 2026.4.1 with AVX512-BF16: the decoder of an encoder-decoder, whose
    attention to the encoder reads inputs, had logits off by 150 % without an error.
    """
    from openvino import opset13 as ops

    for port in [model.input(name) for name in sorted(caches)]:
        shape = port.get_partial_shape()
        readers = [reader for reader in port.get_target_inputs() if reader.get_node().get_type_name() in _ATTENTION]
        if readers:
            # Zeros copy a size from the input. The runtime removes a Reshape that only copies.
            target = [0 if size.is_dynamic else size.get_length() for size in shape]
            target[_TOKENS] = -1
            same = ops.reshape(port, ops.constant(np.array(target, np.int64)), special_zero=True)
            for reader in readers:
                reader.replace_source_output(same.output(0))
    model.validate_nodes_and_infer_types()


def import_quietly() -> Any:
    """Import openvino without the usage report that its package sends on import.

    With `openvino_telemetry` out of reach the package takes the stub that it brings for that case.
    """
    if "openvino" not in sys.modules:
        hidden = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules["openvino_telemetry"]
            if hidden is not None:
                sys.modules["openvino_telemetry"] = hidden
    import openvino

    return openvino


def give_stable_names(model: Any) -> None:
    """Name anonymous operators by their place: the names the runtime makes up count every model of the process."""
    for index, operator in enumerate(model.get_ordered_ops()):
        made_up = operator.get_friendly_name() == operator.get_name()
        if made_up and operator.get_type_name() not in ("Parameter", "Result"):
            operator.set_friendly_name(f"{operator.get_type_name()}_{index}")
