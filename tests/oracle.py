"""The oracle: Sparse-K attention by brute force, one query row at a time, in float64.

Written from the definition alone and slow on purpose: Python sets and `sorted` instead of matrices, so that
a reader can see that it is right. For query row i at position p (the rows are the last of the positions):

    scores   s_j = scale * q.k_j, then softcap, then the additive mask
    allowed  what causality and the mask leave
    always   allowed keys among the first `sinks`, the last `window` allowed up to p, multiples of `stride`
    best     the `top_k` best of the other allowed keys; equal scores: the lower position first; with
             `min_share` of those that get at least this share of the softmax over the allowed keys
    tail     for each aligned block of 64 keys, all of them allowed: n exp(mean score) for its n dropped keys,
             with the mean value of the block
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsek import SparseKConfig

from .strategies import Call

BLOCK = 64
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One query row. `scores` is `softcap(raw) + bias`; the sets hold key positions.

    `magnitude` is the largest sum of |products| behind a score: rounding errors grow with it.
    """

    raw: Array
    bias: Array
    scores: Array
    magnitude: float
    allowed: set[int]
    always: set[int]
    best: set[int]

    @property
    def kept(self) -> set[int]:
        return self.always | self.best


def rows(call: Call) -> Iterator[tuple[tuple[int, int, int], Row]]:
    """All rows of the call, with their index (batch, query head, query)."""
    q, k = to_float64(call.q), to_float64(call.k)
    batch, heads, num_queries, head_size = q.shape
    kv_heads, num_keys = k.shape[1:3]
    scale = 1 / math.sqrt(head_size) if call.scale is None else call.scale
    mask_allows, bias = _mask(call, (batch, heads, num_queries, num_keys))
    for b, h, i in np.ndindex(batch, heads, num_queries):
        keys = k[b, h // (heads // kv_heads)]
        position = num_keys - num_queries + i
        allowed = {j for j in range(num_keys) if mask_allows[b, h, i, j]}
        if call.is_causal:
            allowed = {j for j in allowed if j <= position}
        raw = scale * (keys @ q[b, h, i])
        scores = softcap(raw, call.softcap) + bias[b, h, i]
        magnitude = abs(scale) * float(np.max(abs(keys) @ abs(q[b, h, i]), initial=0))
        always = _always(call, allowed, position)
        candidates = {j for j, share in shares(scores, allowed).items() if share >= call.config.min_share}
        best = _best(scores, candidates - always, call.config.top_k)
        yield (b, h, i), Row(raw, bias[b, h, i], scores, magnitude, allowed, always, best)


def kept(call: Call) -> Array:
    """The kept keys: bool [B, H, Tq, Tk]."""
    matrix = np.zeros((*call.q.shape[:3], call.k.shape[2]), dtype=bool)
    for where, row in rows(call):
        matrix[where][list(row.kept)] = True
    return matrix


def attention(call: Call, given: Array | None = None) -> Array:
    """The output, float64 [B, H, Tq, Dv], over the kept keys, or over a `given` kept set."""
    v = to_float64(call.v)
    group = call.q.shape[1] // call.k.shape[1]
    out = np.zeros((*call.q.shape[:3], v.shape[3]))
    for (b, h, i), row in rows(call):
        kept_keys = row.kept if given is None else set(map(int, np.flatnonzero(given[b, h, i])))
        out[b, h, i] = _attend(call, row, kept_keys, v[b, h // group])
    return out


def assert_kept(call: Call, got: Array) -> None:
    """Fail unless `got`, bool [B, H, Tq, Tk], is a right kept set for every row of the call.

    Where rounding cannot reorder the scores, the set must be the one kept set, ties included. Elsewhere a
    kept key may be worse than the K-th best, or a dropped one better, by eps at most.
    """
    unit = 1e-12 if "float64" in str(call.q.dtype) else 1e-5
    for where, row in rows(call):
        keys = set(map(int, np.flatnonzero(got[where])))
        if call.exact:
            assert keys == row.kept, where
            continue
        assert row.always <= keys <= row.allowed, where
        others = row.allowed - row.always
        chosen, dropped = keys - row.always, others - keys
        assert len(chosen) == len(row.best), where
        if not row.best:
            continue
        kth = min(row.scores[j] for j in row.best)
        # The last term matters for huge inputs only: there large products cancel into a small K-th score.
        eps = unit * max(1, abs(kth), row.magnitude / 10)
        assert all(row.scores[j] >= kth - eps for j in chosen), where
        assert all(row.scores[j] <= kth + eps for j in dropped), where


def assert_output(call: Call, kept: Array, out: Any) -> None:
    """Fail unless `out` is the attention over the keys `kept`.

    Allowed is twice the error of plain PyTorch in the same dtype over the same keys, and a floor that no
    implementation can avoid: rounding the output once, and the scores, which are computed in float32 at
    least, by an error that grows with the products in them. An output that lies between the smallest and
    the largest value cannot be off by more than twice the largest.
    """
    expected, got = attention(call, kept), to_float64(out)
    assert got.shape == expected.shape
    without_tail = replace(call, config=SparseKConfig.pure(1))
    plain_error = abs(_plain_attention(call, kept) - attention(without_tail, kept)).max()
    dtype = torch.as_tensor(call.q).dtype
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    magnitude = max(row.magnitude + abs(row.bias).max() for _, row in rows(call))
    floor = torch.finfo(dtype).eps + 4 * torch.finfo(computed).eps * (1 + magnitude)
    allowed = abs(to_float64(call.v)).max() * min(2, floor)
    if math.isfinite(plain_error):  # plain float16 overflows where the inputs are huge
        allowed += 2 * plain_error
    assert abs(got - expected).max() <= allowed


def _plain_attention(call: Call, kept: Array) -> Array:
    """The lines that everyone writes, in the dtype of the inputs."""
    q, k, v, dropped = (torch.as_tensor(x) for x in (call.q, call.k, call.v, ~kept))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.attn_mask is not None and "bool" not in str(call.attn_mask.dtype):
        scores = scores + torch.as_tensor(call.attn_mask)
    weights = scores.masked_fill(dropped, -torch.inf).softmax(-1).masked_fill(dropped, 0)
    return to_float64(weights @ v)


def to_float64(x: Any) -> Array:
    """A NumPy array, or a tensor of any dtype, as a float64 (or, for bool, a bool) array."""
    if hasattr(x, "detach"):
        x = x.detach()
        x = x.numpy() if "bool" in str(x.dtype) else x.double().numpy()
    return x if x.dtype == bool else x.astype(np.float64)


def softcap(scores: Any, cap: float | None) -> Any:
    return scores if cap is None else cap * np.tanh(scores / cap)


def _mask(call: Call, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """What the mask allows and what it adds, both of the full shape."""
    if call.attn_mask is None:
        return np.ones(shape, dtype=bool), np.zeros(shape)
    mask = np.broadcast_to(to_float64(call.attn_mask), shape)
    if mask.dtype == bool:
        return mask, np.zeros(shape)
    return mask > -np.inf, np.where(mask > -np.inf, mask, 0)


def _always(call: Call, allowed: set[int], position: int) -> set[int]:
    config = call.config
    always = {j for j in allowed if j < config.sinks}
    up_to_here = sorted(j for j in allowed if j <= position)
    window = max(config.window, 1) if config.min_share else config.window
    always |= set(up_to_here[max(0, len(up_to_here) - window) :])
    if config.stride > 0:
        always |= {j for j in allowed if j % config.stride == 0}
    return always


def _best(scores: Array, candidates: set[int], top_k: Any) -> set[int]:
    best_first = sorted(candidates, key=lambda j: (-scores[j], j))
    return set(best_first if top_k == "auto" else best_first[:top_k])


def shares(scores: Array, allowed: set[int]) -> dict[int, float]:
    """What the softmax over the allowed keys gives each of them."""
    peak = max((scores[j] for j in allowed), default=0.0)
    weights = {j: math.exp(scores[j] - peak) for j in allowed}
    total = math.fsum(weights.values())
    return {j: weight / total for j, weight in weights.items()}


def assert_shares(call: Call, got: Array) -> None:
    """Fail unless `got`, bool [B, H, Tq, Tk], has the keys with `min_share`, but for those that rounding can
    put on either side of it."""
    unit = 1e-12 if "float64" in str(call.q.dtype) else 1e-5
    least = call.config.min_share
    for where, row in rows(call):
        slack = math.exp(min(unit * max(1, row.magnitude), 1.0))
        keys = set(map(int, np.flatnonzero(got[where])))
        share = shares(row.scores, row.allowed)
        assert row.always <= keys <= row.allowed, where
        assert all(share[j] >= least / slack for j in keys - row.always), where
        assert all(share[j] <= least * slack for j in row.allowed - keys), where


def assert_estimated_shares(call: Call, got: Array) -> None:
    """Fail unless `got`, bool [B, H, Tq, Tk], has the keys with `min_share` of the sum that the CPU kernel
    estimates, in each row, or the `top_k` best of them: see `estimated_total`."""
    config = call.config
    for where, row in rows(call):
        least = estimated_total(call, row) + math.log(config.min_share)
        eps = 1e-5 * max(1, abs(least) if math.isfinite(least) else 1, row.magnitude / 10)
        keys = set(map(int, np.flatnonzero(got[where])))
        assert row.always <= keys <= row.allowed, where
        chosen, dropped = keys - row.always, row.allowed - keys
        assert all(row.scores[j] >= least - eps for j in chosen), where
        better = [j for j in dropped if row.scores[j] > least + eps]
        if config.top_k == "auto" or len(chosen) < config.top_k:
            assert not better, where
        elif better and chosen:
            assert len(chosen) == config.top_k, where
            assert max(row.scores[better]) <= min(row.scores[list(chosen)]) + eps, where
        if call.exact and all(abs(row.scores[j] - least) > eps for j in row.allowed):
            reaching = {j for j in row.allowed - row.always if row.scores[j] > least}
            assert chosen == _best(row.scores, reaching, config.top_k), where


def estimated_total(call: Call, row: Row) -> float:
    """log-sum-exp of the row's scores: of the always-kept keys exactly, of the others by the mean score of
    each block of 64 keys that are all allowed. -inf where there are none."""
    terms = [row.scores[j] for j in row.always]
    for start in range(0, len(row.raw) - BLOCK + 1, BLOCK):
        others = [j for j in range(start, start + BLOCK) if j not in row.always]
        if others and row.allowed.issuperset(range(start, start + BLOCK)):
            terms.append(math.log(len(others)) + float(softcap(row.raw[others].mean(), call.softcap)))
    peak = max(terms, default=-math.inf)
    if peak == -math.inf:
        return peak
    return float(peak + math.log(math.fsum(math.exp(x - peak) for x in terms)))


def _attend(call: Call, row: Row, kept_keys: set[int], values: Array) -> Array:
    """Softmax over the kept keys and the tail's terms; zeros where there is neither."""
    terms = [(row.scores[j], values[j]) for j in sorted(kept_keys)]
    if call.config.tail == "centroid":
        terms += _tail(call, row, kept_keys, values)
    if not terms:
        return np.zeros(values.shape[1])
    peak = max(score for score, _ in terms)
    weights = np.array([math.exp(score - peak) for score, _ in terms])
    return weights @ np.stack([value for _, value in terms]) / weights.sum()


def _tail(call: Call, row: Row, kept_keys: set[int], values: Array) -> list[tuple[float, Array]]:
    """(log weight, value) of each block that has a term."""
    terms = []
    for start in range(0, len(values) - BLOCK + 1, BLOCK):
        block = range(start, start + BLOCK)
        dropped = [j for j in block if j not in kept_keys]
        if dropped and row.allowed.issuperset(block):
            mean = softcap(row.raw[dropped].mean(), call.softcap) + row.bias[dropped].mean()
            terms.append((math.log(len(dropped)) + mean, values[start : start + BLOCK].mean(0)))
    return terms
