"""Expected error of 8-bit MatMuls, from statistics alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planish.optimizer.interfaces.observers import ChannelObserver


def expected_error(channels: ChannelObserver, scale: np.ndarray, matrices: Sequence[np.ndarray]) -> float:
    """Expected squared error of MatMuls of an activation in 256 fixed steps and matrices whose columns have 255.

    Channels are divided by ``scale``, rows multiplied by it; a channel whose scale is zero is left out. Rounding to
    multiples of a step has a mean squared error of a twelfth of the squared step.
    """
    inverse = np.divide(1, scale, where=scale > 0, out=np.zeros_like(scale))
    step = float((channels.high * inverse).max() - (channels.low * inverse).min()) / 255
    power = float((channels.square * np.square(inverse)).sum())
    error = 0.0
    for matrix in matrices:
        scaled = matrix * scale[:, None]
        error += step**2 * float(np.square(scaled).sum()) / 12
        error += power * float(np.square(np.abs(scaled).max(axis=0) / 127).sum()) / 12
    return error
