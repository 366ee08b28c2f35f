"""Where, on a GPU, dense attention is better than Sparse-K: for `select = "auto"`, which leaves it to us."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Final

from ..arrays import Array
from ..problem import Problem
from . import triton_decode, triton_prefill

log = logging.getLogger("sparsek")

# Measured on an H100 (benchmarks/attention-gpu.jsonl), against cuDNN. Prompts: pairs of a query and a key
# that it sees, which are 5,800 tokens. So many for each head, and for 32 heads of 128 together: with less
# work the passes do not fill the GPU, and take the host longer than dense attention.
_PROMPT_PAIRS: Final = 1 << 24
_PROMPT_WORK: Final = _PROMPT_PAIRS * 32 * 128
# Steps: keys of all key heads and batch entries together, for 8 of them 16,384 and 524,288. Where Python
# calls a step it costs the host 0.07 to 0.2 ms more than a dense one, which matters until that takes the GPU
# longer than the layer takes the host, 0.3 to 0.6 ms.
_STEP_KEYS_IN_GRAPH: Final = 1 << 17
_STEP_KEYS: Final = 1 << 22


def dense_is_better(p: Problem) -> bool:
    """Whether dense attention is faster, or no kernel for GPUs takes the call: then a warning, once."""
    if dense_by_size(p):
        return True
    reason = (triton_decode if p.num_queries == 1 else triton_prefill).why_not(p)
    if reason is not None:
        _warn(reason)
    return reason is not None


def dense_by_size(p: Problem) -> bool:
    """Whether attention is dense already for what the sizes are, without looking at the inputs."""
    if p.keeps_all or not p.rule.or_dense:
        return p.keeps_all
    if p.num_queries == 1:
        return p.index is None or step_is_dense(p.k)
    return prompt_is_dense(p.num_queries, p.num_keys, p.q.shape[0] * p.q.shape[1] * p.q.shape[3])


def prompt_is_dense(queries: int, keys: int, channels: int) -> bool:
    """Whether prompts are attended to densely, for it is faster: the last `queries` of so many keys.
    channels: of all heads of queries together, and of all batch entries."""
    pairs = queries * (keys - queries // 2)
    return pairs < _PROMPT_PAIRS or pairs * channels < _PROMPT_WORK


def step_is_dense(k: Array) -> bool:
    """Whether a step with the keys k [B, Hkv, Tk, D] is attended to densely, for it is faster."""
    least = _STEP_KEYS_IN_GRAPH if triton_decode.capturing(k) else _STEP_KEYS
    return bool(math.prod(k.shape[:3]) < least)


@cache
def _warn(reason: str) -> None:
    log.warning("attention is dense on this GPU, for Sparse-K has no kernel there for such calls: %s", reason)
