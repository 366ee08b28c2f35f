"""Where, on a GPU, dense attention is better than Sparse-K: for `select = "auto"`, which leaves it to us."""

from __future__ import annotations

import logging
from functools import cache
from typing import Final

from ..problem import Problem
from . import triton_decode, triton_prefill

log = logging.getLogger("sparsek")

# Measured on an H100 (benchmarks/attention-gpu.jsonl) with 32 heads, 8 key heads, against cuDNN:
_PROMPT_PAIRS: Final = 1 << 24  # pairs of a query and a key that it may see, for each head: 5,800 tokens
_STEP_KEYS: Final = 1 << 17  # keys of all key heads and batch entries together


def dense_is_better(p: Problem) -> bool:
    """Whether dense attention is faster, or no kernel for GPUs takes the call: then a warning, once."""
    if p.num_queries == 1:
        if p.k.shape[0] * p.k.shape[1] * p.num_keys < _STEP_KEYS or p.index is None:
            return True
        reason = triton_decode.why_not(p)
    else:
        if p.num_queries * (p.num_keys - p.num_queries // 2) < _PROMPT_PAIRS:
            return True
        reason = triton_prefill.why_not(p)
    if reason is not None:
        _warn(reason)
    return reason is not None


@cache
def _warn(reason: str) -> None:
    log.warning("attention is dense on this GPU, for Sparse-K has no kernel there for such calls: %s", reason)
