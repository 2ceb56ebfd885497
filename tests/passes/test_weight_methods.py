"""Weight methods and activation modes: what each keeps, and the tables that they are found in."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, is_dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.passes.quantization._blocks import BlockFormat
from planish.passes.quantization.methods import METHODS
from planish.passes.quantization.quantize_int8 import QuantizeInt8
from planish.passes.quantization.quantize_weights import QuantizeWeights

FORMAT = BlockFormat(4, 16, symmetric=True)
MODES = get_args(get_type_hints(QuantizeInt8)["activations"])


@pytest.mark.parametrize("cls", [QuantizeWeights, QuantizeInt8])
def test_every_method_of_an_option_is_in_the_table(cls: type[QuantizeWeights | QuantizeInt8]) -> None:
    assert set(get_args(get_type_hints(cls)["method"])) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_frozen_dataclass_in_a_file_of_its_name(name: str) -> None:
    method = METHODS[name](FORMAT)
    assert method.name == name
    assert type(method).__module__.rpartition(".")[2] == name
    assert is_dataclass(method)
    with pytest.raises(FrozenInstanceError):
        method.format = FORMAT  # type: ignore[misc]


@pytest.mark.parametrize("activations", MODES)
def test_an_activation_mode_is_in_a_file_of_its_name(
    activations: Literal["token", "tensor", "runtime", "static"],
) -> None:
    mode = QuantizeInt8(activations=activations).mode
    assert type(mode).__module__.rpartition(".")[2] == activations
    assert bool(mode.statistics) == (activations == "static")


def test_a_method_that_needs_statistics_says_which_are_missing() -> None:
    with pytest.raises(ValueError, match="no Gram matrix"):
        METHODS["gptq"](FORMAT).fit(np.ones((16, 2), np.float32))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    method=st.sampled_from(["nearest", "mse", "hqq"]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_entry_is_further_than_its_range_allows(
    bits: int, symmetric: bool, method: str, scale: float, zeros: bool, seed: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((64, 96)).astype(np.float32) * np.float32(scale)
    matrix[:16] *= 0 if zeros else 1  # a block of zeros
    blocks = METHODS[method](BlockFormat(bits, 16, symmetric)).fit(matrix)
    integers, dequantized = blocks.integers(matrix), blocks.dequantized(matrix)
    assert np.isfinite(blocks.scale).all()
    assert (blocks.scale > 0).all()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert integers.min() >= low
    assert integers.max() <= high
    assert not zeros or not dequantized[:16].any()
    reach = np.abs(matrix).reshape(-1, 16, 96).max(axis=1, keepdims=True)
    error = np.abs(dequantized - matrix).reshape(-1, 16, 96)
    assert (error <= reach * (1.01 if bits == 4 else 0.6) + 1e-30).all()


def test_a_search_is_never_worse_than_the_whole_range() -> None:
    matrix = np.random.default_rng(0).standard_t(3, (256, 32)).astype(np.float32)  # outliers
    errors = {
        method: float(np.square(blocks.dequantized(matrix) - matrix).sum())
        for method in ("nearest", "mse")
        for blocks in [METHODS[method](BlockFormat(4, 64, symmetric=True)).fit(matrix)]
    }
    assert errors["mse"] < 0.9 * errors["nearest"]
