"""How many scores enter the softmax: half of N x N for dense attention, about N x K for Sparse-K; and what K
is in numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..config import SparseKConfig
from ..policy import Rule, by_share, fixed, on_device, resolve


def top_k_used(config: SparseKConfig | None, context: int, device: str = "cpu") -> int | list[int] | None:
    """K as records carry it, in numbers: what "auto" is at the end of this context, and on a GPU the keys of
    a list; one for each layer where K is given so. None for dense attention, and where it is a share."""
    if config is None or by_share(on_device(config, device)):
        return None
    budgets: Any = fixed(config, context, device).top_k
    return list(budgets) if isinstance(budgets, tuple) else budgets


def scores_used(
    config: SparseKConfig | None, num_tokens: int, num_layers: int, num_heads: int
) -> tuple[int, int]:
    """(kept, full): scores of a causal prompt that enter the softmax, summed over heads and layers. By share,
    which keeps as many as the scores say, `kept` is the most."""
    full = num_tokens * (num_tokens + 1) // 2
    kept = 0
    for layer in range(num_layers):
        rule = None if config is None else resolve(config, num_tokens, layer=layer)
        kept += full if rule is None or rule.keeps_all(num_tokens) else _kept_by_one_head(rule, num_tokens)
    return kept * num_heads, full * num_layers * num_heads


@lru_cache
def _kept_by_one_head(rule: Rule, num_tokens: int) -> int:
    """How many keys a row keeps does not depend on the scores."""
    seen = np.arange(1, num_tokens + 1)  # by each row
    sinks = np.minimum(seen, rule.sinks)
    begin = seen - rule.window
    if rule.tile:
        begin = (seen - 1) // rule.tile * rule.tile - max(rule.window - 1, 0)
    window = np.maximum(begin, sinks)  # where it begins
    strided = -(-window // rule.stride) + -sinks // rule.stride if rule.stride else 0
    always = sinks + (seen - window) + strided
    return int(np.minimum(seen, always + rule.top_k).sum())
