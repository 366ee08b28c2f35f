"""What each layer loses when it keeps K keys: from the weights of dense attention, in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ..config import KEEP_ALL, SparseKConfig
from ..engines.base import Engine, Part
from ..integrations.keys_seen import keys_seen
from ..kernels import reference
from ..policy import Rule
from ..problem import Problem
from ..verify import sample
from .attention_mass import on_torch

_ROWS: Final = 256  # of each head, over a whole window


@dataclass(frozen=True)
class DroppedMass:
    """`dropped[i]`: the mean share of the softmax that is outside what is always kept and the budgets[i] best
    keys."""

    budgets: tuple[int, ...]
    dropped: tuple[float, ...]

    def at(self, budget: int) -> float:
        """Between two budgets, along the line through the logarithms."""
        pairs = list(zip(self.budgets, self.dropped, strict=True))
        if budget <= pairs[0][0]:
            return pairs[0][1]
        for (k0, d0), (k1, d1) in itertools.pairwise(pairs):
            if budget <= k1:
                share = (budget - k0) / (k1 - k0)
                return math.exp(math.log(max(d0, 1e-12)) * (1 - share) + math.log(max(d1, 1e-12)) * share)
        return pairs[-1][1]


def dropped_mass(
    engine: Engine, window: list[int], form: SparseKConfig, budgets: Sequence[int]
) -> dict[int, DroppedMass]:
    """Of each layer in whose calls some row sees `form.min_context` keys, on one window."""
    sums: dict[int, torch.Tensor] = {}
    rows: dict[int, int] = {}

    def observe(layer: int, problem: Problem, _out: Any) -> None:
        p = on_torch(problem)
        mask = None if p.mask is None else p.mask[:, :1]  # the same for all heads
        if keys_seen(p.q, p.k, mask, p.starts, None, enough=form.min_context, layer=None) < form.min_context:
            return
        wanted = max(8, _ROWS * problem.num_queries // len(window))
        found, count = _dropped(problem, form, budgets, wanted)
        sums[layer] = sums.get(layer, 0) + found
        rows[layer] = rows.get(layer, 0) + count

    chunks = engine.logits([Part(window, KEEP_ALL, scored=len(window))])
    done = False
    while not done:
        with engine.observed(observe):
            done = next(chunks, None) is None
    return {
        layer: DroppedMass(tuple(budgets), tuple((total / rows[layer]).tolist()))
        for layer, total in sorted(sums.items())
    }


def _dropped(p: Problem, form: SparseKConfig, budgets: Sequence[int], rows: int) -> tuple[torch.Tensor, int]:
    """Sums over sampled rows of all heads, [budgets]; and the number of rows."""
    rule = Rule(0, form.sinks, form.window, form.stride, "none")
    p = replace(on_torch(p), rule=rule)
    total, count = torch.zeros(len(budgets), dtype=torch.float64), 0
    for block in sample(p.num_queries, rows):
        for chunk in reference.chunks(p.rows(block)):
            shares = torch.where(chunk.allowed, chunk.scores, -math.inf).softmax(-1).nan_to_num(0.0)
            free = torch.where(chunk.kept, 0.0, shares)
            best = free.sort(-1, descending=True).values.double()
            left = best.sum(-1, keepdim=True) - best.cumsum(-1)
            left = torch.cat([best.sum(-1, keepdim=True), left], -1).clamp(min=0)  # [..., n + 1]: of K = 0 ..
            index = torch.tensor([min(k, left.shape[-1] - 1) for k in budgets])
            total += left[..., index.to(left.device)].flatten(0, -2).sum(0).cpu()
            count += left[..., 0].numel()
    return total, count
