"""Timing two or more things against each other: in alternation, so that drift hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Final

_WIDE: Final = 0.1


def alternate(
    calls: Sequence[Callable[[], float]], repetitions: int, advance: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Call each in turn, `repetitions` times; a call returns the seconds it took. One list per call.

    Every second round goes backwards, so that none is always measured right after the same neighbour.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions):
        order = range(len(calls)) if repetition % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            samples[i].append(calls[i]())
            advance()
    return samples


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster `ours` is: median, lower and upper quartile over the paired repetitions."""
    return _quartiles([b / o for b, o in zip(baseline, ours, strict=True)])


def is_wide(middle: float, low: float, high: float) -> bool:
    """Whether the middle half of the repetitions is wider than a tenth of their median, which then says
    little."""
    return high - low > _WIDE * middle


def are_wide(samples: Sequence[float]) -> bool:
    """`is_wide` for the quartiles of these."""
    return is_wide(*_quartiles(samples))


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, low, high
