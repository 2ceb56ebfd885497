"""What was timed, weighed: which engine of each component is shipped, and what the lock says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from planish.optimizer.calibration.sensitivity import Decision
from planish.optimizer.output.lock import Product, Speed, Trial
from planish.optimizer.timing.interleaved import Timing

Timed = Mapping[str, Mapping[str, Timing]]
"""Component -> shape -> timing, the speed-up over the plain lowering in it."""


def fastest(engines: Sequence[Mapping[str, Timing]]) -> int:
    """The first, unless another is faster with its whole interval, over all shapes together."""
    best = 0
    for index, timings in enumerate(engines):
        best = index if _low(timings) > math.prod(timing.speedup for timing in engines[best].values()) else best
    return best


def fastest_of_each(engines: Sequence[Timed], *, apart: bool) -> dict[str, int]:
    """Component -> the engine to take it from; unless they may be taken ``apart``, all are of one."""
    if apart:
        return {name: fastest([own[name] for own in engines]) for name in engines[0]}
    return dict.fromkeys(engines[0], fastest([_labelled(own) for own in engines]))


def faster(timed: Timed, *, apart: bool) -> list[str]:
    """The components that are faster than in the plain lowering; unless they may be taken ``apart``, all or none."""
    if apart:
        return [name for name, timings in timed.items() if is_faster(timings)]
    return list(timed) if is_faster(_labelled(timed)) else []


def is_faster(timings: Mapping[str, Timing]) -> bool:
    """Whether an engine is measurably faster than the plain lowering, over all shapes together."""
    return _low(timings) > 1


def _low(timings: Mapping[str, Timing]) -> float:
    """The lower end of the interval of the product of all speed-ups.

    Shapes are timed one after the other, so their errors are independent: the squares of their logarithms add up.
    """
    errors = [math.log(timing.speedup / timing.low) for timing in timings.values()]
    return math.prod(timing.speedup for timing in timings.values()) / math.exp(math.hypot(*errors))


def reason(components: Sequence[str], won: Sequence[str]) -> str:
    """Why an engine is shipped, whose components ``won`` are faster than the plain lowering."""
    if not won:
        return "not measurably faster than the plain lowering"
    plain = [name for name in components if name not in won]
    return "faster than the plain lowering" + (f"; left plain: {', '.join(plain)}" if plain else "")


def trial(passes: str, obstacle: str | None, kept: Sequence[str], won: Sequence[str], timed: Timed) -> Trial:
    """The record of passes that were tried: ``kept`` are the components of ``won`` that have them."""
    if obstacle is not None:
        return Trial(passes=passes, kept=False, why=obstacle)
    why = "faster than without" if kept else "not measurably faster than without"
    why += f", in {', '.join(kept)}" if kept and len(kept) < len(won) else ""
    return Trial(passes=passes, kept=bool(kept), why=why, measured=speeds(timed))


def product(component: str, decision: Decision) -> Product:
    """The record of a product that a pass may round."""
    loss = decision.loss
    return Product(
        component=component,
        text=decision.text,
        product=loss.product,
        location=loss.location,
        noise=loss.relative_mse,
        effect=loss.output_error,
        weights=loss.weights,
        rounded=decision.rounded,
    )


def speeds(timed: Timed) -> list[Speed]:
    """Speed-ups as the lock keeps them; where there are several components, the shape follows the component."""
    return [
        Speed(shape=label, speedup=_short(found.speedup), low=_short(found.low), high=_short(found.high))
        for label, found in _labelled(timed).items()
    ]


def side_by_side(plain: Timed, optimized: Timed) -> dict[str, dict[str, Timing]]:
    """Shape -> the timings of both."""
    other = _labelled(optimized)
    return {label: {"plain": timing, "optimized": other[label]} for label, timing in _labelled(plain).items()}


def _labelled(timed: Timed) -> dict[str, Timing]:
    return {
        shape if len(timed) == 1 else f"{component} {shape}": timing
        for component, timings in timed.items()
        for shape, timing in timings.items()
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
