"""Timing two or more things against each other: in alternation, so that drift hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence


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
    ratios = sorted(b / o for b, o in zip(baseline, ours, strict=True))
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(ratios), low, high
