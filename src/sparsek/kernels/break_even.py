"""Where, on a GPU, dense attention is better than Sparse-K: for `select = "auto"`, which leaves it to us."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Final

from ..problem import Problem
from . import triton_decode, triton_prefill

log = logging.getLogger("sparsek")

# Measured on an H100 (benchmarks/attention-gpu.jsonl) with 32 heads, 8 key heads, against cuDNN:
_PROMPT_PAIRS: Final = 1 << 24  # pairs of a query and a key that it may see, for each head: 5,800 tokens
# Keys of all key heads and batch entries together; for 8 of them 16,384 and 524,288. A step is several
# launches: 0.03 to 0.3 ms in a CUDA graph, but some 0.5 ms of the host where Python calls it.
_STEP_KEYS_IN_GRAPH: Final = 1 << 17
_STEP_KEYS: Final = 1 << 22


def dense_is_better(p: Problem) -> bool:
    """Whether dense attention is faster, or no kernel for GPUs takes the call: then a warning, once."""
    if p.num_queries == 1:
        if p.k.shape[0] * p.k.shape[1] * p.num_keys < _least_keys() or p.index is None:
            return True
        reason = triton_decode.why_not(p)
    else:
        if _has_few_pairs(p.num_queries, p.num_keys):
            return True
        reason = triton_prefill.why_not(p)
    if reason is not None:
        _warn(reason)
    return reason is not None


def prompt_is_dense(tokens: int) -> bool:
    """Whether a prompt of so many tokens is attended to densely, for it is faster."""
    return _has_few_pairs(tokens, tokens)


def _has_few_pairs(queries: int, keys: int) -> bool:
    return queries * (keys - queries // 2) < _PROMPT_PAIRS


def _least_keys() -> int:
    """Keys from which a step is sparse."""
    cuda = sys.modules["torch"].cuda
    return _STEP_KEYS_IN_GRAPH if cuda.is_available() and cuda.is_current_stream_capturing() else _STEP_KEYS


@cache
def _warn(reason: str) -> None:
    log.warning("attention is dense on this GPU, for Sparse-K has no kernel there for such calls: %s", reason)
