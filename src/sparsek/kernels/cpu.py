"""The compiled kernel: Sparse-K attention on the CPU, and dense attention for rules that keep all.

Every pair is scored in 8 bits; a bound on the error turns those scores into a few candidates that must
contain the best K, or all with `min_share`, and only these are scored exactly. cpp/src/kernel/select.h and
share.h say why nothing is missed. The K best are exact; a share is of an estimate of the softmax's sum, from
what is always kept and the means of blocks, so that some keys more are kept than have it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _core, arrays
from ..arrays import Array
from ..problem import Problem
from ..selection import Selection

TAKES = "float32, float16 and bfloat16 on the CPU, with any mask that only allows and forbids"

_DTYPES = ("float32", "float16", "bfloat16")
_MAX_TOKENS = 2**31 - 1


def why_not(p: Problem) -> str | None:
    """Why this kernel cannot do the call, or None when it can."""
    if arrays.is_torch(p.q):
        if p.q.device.type != "cpu":
            return f"the inputs are on {p.q.device}"
        if arrays.wants_gradient(p.q, p.k, p.v, p.mask):
            return "a gradient is wanted"
        if not all(x is None or arrays.has_data(x) for x in (p.q, p.k, p.v, p.mask)):
            return "the tensors have no data of their own"
    if p.rule.tile and not p.keeps_all:
        return "keys are chosen by tiles"
    if str(p.q.dtype).removeprefix("torch.") not in _DTYPES:
        return f"the dtype is {p.q.dtype}"
    if p.num_keys == 0:
        return "there are no keys"
    if max(p.num_keys, p.num_queries) > _MAX_TOKENS:
        return "there are 2^31 tokens or more"
    if p.mask is not None and not _only_forbids(p.mask):
        return "the mask adds numbers to the scores"
    return None


def attention(p: Problem, out: Array | None = None) -> Array:
    """[B, H, Tq, Dv] in the dtype of q; in `out` where that is given, whose last axis is contiguous."""
    assert p.v is not None
    if out is None:
        out = arrays.empty((*p.q.shape[:3], p.v.shape[3]), p.q.dtype, p.q)
    _core.attention(
        q=_rows(p.q),
        k=_rows(p.k),
        v=_rows(p.v),
        out=out,
        mask=_bytes(p.mask),
        is_causal=p.is_causal,
        first_position=p.first_position,
        scale=p.scale,
        softcap=p.softcap or 0.0,
        top_k=p.rule.top_k,
        sinks=p.rule.sinks,
        window=p.rule.window,
        stride=p.rule.stride,
        centroid_tail=p.rule.tail == "centroid",
        min_share=p.rule.min_share,
        num_threads=_threads(p.q),
        index=None if p.index is None else p.index._core,
    )
    return out


def select(p: Problem) -> Selection:
    """The kept keys of every row."""
    xp = arrays.namespace(p.q)
    counts = arrays.empty(tuple(p.q.shape[:3]), xp.int32, p.q)
    width = p.rule.most_kept(p.num_keys)
    if width is None:
        _select(p, None, counts)
        width = int(counts.max()) if math.prod(counts.shape) else 0
    indices = arrays.empty((*p.q.shape[:3], width), xp.int32, p.q)
    _select(p, indices, counts)
    return Selection(indices, counts, p.num_keys)


def _select(p: Problem, indices: Array | None, counts: Array) -> None:
    whole = p.whole or p
    _core.select(
        q=_rows(p.q),
        k=_rows(p.k),
        indices=indices,
        counts=counts,
        mask=_bytes(p.mask),
        is_causal=p.is_causal,
        first_position=p.first_position,
        scale=p.scale,
        softcap=p.softcap or 0.0,
        top_k=p.rule.top_k,
        sinks=p.rule.sinks,
        window=p.rule.window,
        stride=p.rule.stride,
        min_share=p.rule.min_share,
        whole_queries=_MAX_TOKENS if whole.index is not None else whole.num_queries,
        num_threads=_threads(p.q),
    )


def _only_forbids(mask: Array) -> bool:
    xp = arrays.namespace(mask)
    return mask.dtype == xp.bool or bool(((mask == 0) | (mask == -xp.inf)).all())


def _rows(x: Array) -> Array:
    """The array as the core takes it: any strides of whole numbers, but the last axis contiguous."""
    if arrays.is_torch(x):
        x = x.detach()
        return x if x.stride(3) == 1 else x.contiguous()
    whole = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
    return x if whole and x.strides[3] == x.itemsize else np.ascontiguousarray(x)


def _bytes(mask: Array | None) -> Array | None:
    """1 where a key is allowed."""
    if mask is None:
        return None
    xp = arrays.namespace(mask)
    allowed = mask if mask.dtype == xp.bool else mask == 0
    return allowed.view(xp.uint8)


def _threads(x: Any) -> int:
    return int(arrays.namespace(x).get_num_threads()) if arrays.is_torch(x) else _core.num_threads()
