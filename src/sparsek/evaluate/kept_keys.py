"""How many keys the rows of a text keep, by layer, where that depends on the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..bench.kept import sampled_kept
from ..config import SparseKConfig
from ..engines.base import Engine, Part
from ..problem import Problem
from .attention_mass import on_torch
from .quality import observed_logits


class KeptObserver:
    """Observer of attention that samples how many keys rows keep. Calls that keep everything are left out."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, float]] = {}  # by layer and position

    def __call__(self, layer: int, problem: Problem, _out: Any) -> None:
        if not problem.keeps_all:
            positions, kept = sampled_kept(on_torch(problem))
            self._kept.setdefault(layer, {}).update(zip(positions, kept, strict=True))

    @property
    def layers(self) -> list[int]:
        """Those in which some row does not keep everything."""
        return sorted(self._kept)

    def scores(self, layer: int, num_tokens: int) -> float:
        """Scores of one head of a layer that enter the softmax, for the first tokens of what was observed."""
        every = np.arange(num_tokens)
        found = sorted(self._kept.get(layer, {}).items())
        if not found:
            return float((every + 1).sum())
        positions, kept = np.array(found).T
        return float(np.minimum(every + 1, np.interp(every, positions, kept)).sum())


def observed_kept(
    engine: Engine, tokens: list[int], config: SparseKConfig, advance: Callable[[int], None] = lambda _: None
) -> KeptObserver:
    """What rows keep while the engine reads `tokens`, whatever `min_context` is."""
    observer = KeptObserver()
    part = Part(tokens, replace(config, min_context=0), scored=len(tokens))
    for _ in observed_logits(engine, [part], observer, advance):
        pass
    return observer
