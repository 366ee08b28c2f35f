"""How many scores enter the softmax: half of N x N for dense attention, about N x K for Sparse-K."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..config import SparseKConfig
from ..kernels import dispatch
from ..policy import resolve
from ..problem import NO_VALUES, make_problem


def scores_used(
    config: SparseKConfig | None, num_tokens: int, num_layers: int, num_heads: int
) -> tuple[int, int]:
    """(kept, full): scores of a causal prompt that enter the softmax, summed over heads and layers."""
    full = num_tokens * (num_tokens + 1) // 2
    kept = 0
    for layer in range(num_layers):
        if config is None or resolve(config, num_tokens, layer=layer).keeps_all(num_tokens):
            kept += full
        else:
            kept += _kept_by_one_head(config, num_tokens, layer if isinstance(config.top_k, tuple) else None)
    return kept * num_heads, full * num_layers * num_heads


@lru_cache
def _kept_by_one_head(config: SparseKConfig, num_tokens: int, layer: int | None) -> int:
    """How many keys a row keeps does not depend on the scores: one head of size 1 is enough to count."""
    x = np.zeros((1, 1, num_tokens, 1), dtype=np.float32)
    problem = make_problem(x, x, NO_VALUES, config=config, is_causal=True, layer=layer)
    return int(dispatch.select(problem).counts.sum())
