"""The specification of Sparse-K attention: plain and readable. Every other kernel is tested against it.

For query row i at position p_i (the rows are the last of the Tk positions), with the scores
s_ij = softcap(scale * q_i . k_j) + mask_ij and the allowed keys A_i:

    always_i  allowed keys among the first `sinks` positions, the last `window` allowed positions up to p_i,
              and the allowed multiples of `stride`
    topk_i    the `top_k` best allowed keys outside always_i; equal scores: the lower position first. With
              `min_share`, of those that have at least this share of the row's softmax over A_i
    S_i       their union; out_i = sum_S e^s v / sum_S e^s

With `select = "tile"` the rows of a tile, which are those at positions [tT, (t+1)T), and all heads of a key
head's group share one list and what is always kept:

    always_t  the first `sinks` positions, the multiples of `stride`, those from begin_t on and, for a larger
              window, from begin_t - window + 1 on
    begin_t   tT, the start of the tile. Where a mask hides the end from a row (padding on the right, a cache
              that is not filled yet), the start of the tile of e_i, the last key up to p_i that row i may
              see: the least floor(e_i / T) T of the rows that have such a key
    list_t    the `top_k` best keys outside always_t that some row may see, by the largest share of the
              softmax that any row gives them: max of s_ij - log-sum-exp of row i. With `min_share`, of those
              for which it is at least that
    S_i       what of always_t and list_t row i may see

`tail = "centroid"` adds one term to both sums for each aligned block b of 64 keys that is wholly allowed:
weight n exp(mean of s over the n dropped keys of b), value the mean of v over b. The mean is taken before
the softcap, then capped. For a tile it is the mean over all keys of b: a list that many rows share drops keys
that are good for some of them. A row with no allowed key is zero. What is in no sum has no part in the
result, whatever it is: NaN and infinity in keys and values that a row may not see change nothing.

Queries are processed in chunks, so memory is O(chunk x Tk), never Tq x Tk. Works on NumPy arrays and torch
tensors, in float64 or, for every smaller dtype, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import arrays
from ..arrays import Array
from ..problem import Problem
from ..selection import Selection

TAKES = "everything; exact, but slower than dense attention"

BLOCK = 64  # keys that share one centroid
_CHUNK_ELEMENTS = 1 << 22  # scores held at once: 16 MiB in float32


@dataclass(frozen=True)
class Chunk:
    """Some query rows against the first `n` keys: all that the causal rule lets any of them see.

    Query heads are split as [Hkv, G], the KV head and the head within its group.

    Attributes:
        rows: which query rows.
        raw: [B, Hkv, G, R, n], scale * q.k. scores: the same, capped and with the mask added.
        bias: the additive mask, broadcastable to `raw`, or None.
        allowed: bool, broadcastable to `raw`. kept: bool [B, Hkv, G, R, n].
        always: bool, broadcastable to `raw`, those of `kept` that were not chosen by their scores.
    """

    rows: slice
    raw: Array
    scores: Array
    bias: Array | None
    allowed: Array
    kept: Array
    always: Array


def why_not(_: Problem) -> str | None:
    """Why this kernel cannot do the call: it can do all."""
    return None


def attention(p: Problem, selection: Selection | None = None) -> Array:
    """Sparse-K attention. Returns [B, H, Tq, Dv] in the dtype of q.

    With `selection`, attends over that kept set instead of its own: what another kernel's output is
    compared with, given the keys that this kernel kept.
    """
    assert p.v is not None
    v = arrays.cast(p.v, arrays.compute_dtype(p.v))
    given = None if selection is None else _split_heads(selection.to_mask(), p.k.shape[1])
    out = arrays.empty((*p.q.shape[:3], v.shape[-1]), p.q.dtype, p.q)
    for chunk in chunks(p):
        if given is not None:
            chunk = replace(chunk, kept=given[:, :, :, chunk.rows, : chunk.kept.shape[-1]])
        out[:, :, chunk.rows] = arrays.cast(_attend(p, chunk, v), p.q.dtype)
    return out


def select(p: Problem) -> Selection:
    """The kept keys of every row."""
    batch, heads, num_queries, _ = p.q.shape
    kept = arrays.full((batch, heads, num_queries, p.num_keys), False, arrays.namespace(p.q).bool, p.q)
    for chunk in chunks(p):
        kept[:, :, chunk.rows, : chunk.kept.shape[-1]] = chunk.kept.reshape(
            batch, heads, *chunk.kept.shape[3:]
        )
    return Selection.from_kept(kept, p.rule.most_kept(p.num_keys))


def chunks(p: Problem) -> Iterator[Chunk]:
    """Score the keys and choose among them, some query rows at a time."""
    batch, heads, num_queries, _ = p.q.shape
    per_row = max(1, batch * heads * p.num_keys)
    step = max(1, _CHUNK_ELEMENTS // per_row)
    k = arrays.cast(p.k, arrays.compute_dtype(p.k))
    tile = p.rule.tile or 1
    step = -(-step // tile) * tile
    start = 0
    while start < num_queries:
        stop = start + step - (p.first_position + start) % tile  # a tile is never split
        yield _chunk(p, k, slice(start, min(stop, num_queries)))
        start = stop


def _chunk(p: Problem, k: Array, rows: slice) -> Chunk:
    xp = arrays.namespace(k)
    batch, heads, num_queries, head_size = p.q.shape
    kv_heads = k.shape[1]
    n = p.num_keys
    if p.is_causal:
        n = min(n, max(0, p.first_position + rows.stop))

    q = arrays.cast(p.q[:, :, rows], k.dtype)
    group, num_rows = heads // kv_heads, rows.stop - rows.start
    grouped = q.reshape(batch, kv_heads, group * num_rows, head_size)  # one product for all heads of a group
    raw = xp.matmul(grouped, xp.swapaxes(k[:, :, :n], 2, 3)) * p.scale
    raw = raw.reshape(batch, kv_heads, group, num_rows, n)
    scores = _softcap(raw, p.softcap)

    key = arrays.arange(n, k)
    position = (arrays.arange(num_queries, k)[rows] + p.first_position)[:, None]
    reachable = key <= position  # [R, n]
    allowed = reachable if p.is_causal else xp.ones_like(reachable)
    bias = None
    if p.starts is not None:
        allowed = allowed & (key >= p.starts[:, None, None, rows, None])
    if p.mask is not None:
        mask = _split_heads(p.mask[:, :, rows, :n], kv_heads)
        if mask.dtype == xp.bool:
            allowed = allowed & mask
        else:
            bias = arrays.narrow(mask, k.dtype)
            allowed = allowed & (bias > -xp.inf)
            scores = scores + bias
    if p.rule.tile:
        kept, always = _kept_by_tiles(p, scores, allowed, reachable, rows, key)
    else:
        kept, always = _kept(p, scores, allowed, reachable, key)
    return Chunk(rows, raw, scores, bias, allowed, kept, always)


def _kept(p: Problem, scores: Array, allowed: Array, reachable: Array, key: Array) -> tuple[Array, Array]:
    """S_i = always_i u topk_i, as a boolean matrix of the shape of `scores`; and always_i."""
    xp = arrays.namespace(scores)
    if p.keeps_all or scores.shape[-1] == 0:
        allowed = xp.broadcast_to(allowed, scores.shape)
        return allowed, allowed
    rule = p.rule
    past = allowed & reachable
    distance = xp.sum(past, -1)[..., None] - xp.cumsum(past, -1)  # allowed positions between j and p_i
    always = allowed & ((key < rule.sinks) | (past & (distance < rule.window)))
    if rule.stride:
        always = always | (allowed & (key % rule.stride == 0))
    candidates = allowed & ~always
    if rule.min_share:
        candidates = candidates & (log_share(scores, allowed) >= math.log(rule.min_share))
    return always | _top_k(scores, candidates, rule.top_k), always


def _kept_by_tiles(
    p: Problem, scores: Array, allowed: Array, reachable: Array, rows: slice, key: Array
) -> tuple[Array, Array]:
    """S_i = what of always_t u list_t row i may see, as a boolean matrix of the shape of `scores`; and what
    of always_t it may see."""
    xp = arrays.namespace(scores)
    allowed = xp.broadcast_to(allowed, scores.shape)
    if p.keeps_all or scores.shape[-1] == 0:
        return allowed, allowed
    rule = p.rule
    share = log_share(scores, allowed)
    kept, of_rows = (arrays.full(scores.shape, False, xp.bool, scores) for _ in range(2))
    for tile in tiles(p, rows):
        position = p.first_position + rows.start + tile.start
        seen = allowed[:, :, :, tile]
        begin = _begin(seen & reachable[tile], key, position // rule.tile * rule.tile, rule.tile)
        always = (key < rule.sinks) | (key > begin[..., None] - max(rule.window, 1))
        if rule.stride:
            always = always | (key % rule.stride == 0)
        best = xp.amax(share[:, :, :, tile], (2, 3))
        candidates = seen.any(3).any(2) & ~always
        if rule.min_share:
            candidates = candidates & (best >= math.log(rule.min_share))
        chosen = always | _top_k(best, candidates, rule.top_k)
        kept[:, :, :, tile] = seen & chosen[:, :, None, None]
        of_rows[:, :, :, tile] = seen & always[:, :, None, None]
    return kept, of_rows


def tiles(p: Problem, rows: slice) -> Iterator[slice]:
    """Of the rows of a chunk, counted from its first: those of one tile after another."""
    start, num_rows = 0, rows.stop - rows.start
    while start < num_rows:
        position = p.first_position + rows.start + start
        stop = min(num_rows, start + p.rule.tile - position % p.rule.tile)
        yield slice(start, stop)
        start = stop


def _begin(past: Array, key: Array, start: int, tile: int) -> Array:
    """begin_t of the tile at `start`: [B, Hkv]. `past` is what its rows may see up to their positions."""
    xp = arrays.namespace(past)
    last = xp.amax(xp.where(past, key, -1), -1)
    return xp.amin(xp.where(last < 0, start, last // tile * tile), (2, 3))


def log_share(scores: Array, allowed: Array) -> Array:
    """log of the softmax over the allowed keys; -inf elsewhere."""
    xp = arrays.namespace(scores)
    total = log_total(scores, allowed)[..., None]
    return xp.where(allowed, scores - xp.where(total == -xp.inf, 0, total), -xp.inf)


def log_total(scores: Array, allowed: Array) -> Array:
    """log of the sum of e^s over the allowed keys of each row; -inf where there are none."""
    xp = arrays.namespace(scores)
    scores = xp.where(allowed, scores, -xp.inf)
    peak = xp.amax(scores, -1)
    finite = xp.where(peak == -xp.inf, 0, peak)
    total = xp.sum(xp.exp(scores - finite[..., None]), -1)
    return xp.where(peak == -xp.inf, -xp.inf, finite + xp.log(xp.where(total == 0, 1, total)))


def _top_k(scores: Array, candidates: Array, top_k: int) -> Array:
    """The `top_k` best candidates of each row, all of them where there are fewer; ties to the lower index."""
    xp = arrays.namespace(scores)
    if top_k == 0 or scores.shape[-1] == 0:
        return xp.zeros_like(scores, dtype=xp.bool)
    if top_k >= scores.shape[-1]:
        return xp.broadcast_to(candidates, scores.shape)
    best_first = xp.where(candidates, scores, -xp.inf)
    threshold = arrays.kth_largest(best_first, top_k)
    chosen = candidates & (best_first >= threshold)
    if not bool((xp.sum(chosen, -1) > top_k).any()):
        return chosen
    above = best_first > threshold
    level = chosen & ~above
    room = top_k - xp.sum(above, -1)[..., None]
    return above | (level & (xp.cumsum(level, -1) <= room))


def _attend(p: Problem, chunk: Chunk, v: Array) -> Array:
    """Softmax over the kept keys and, as further keys, the centroids: [B, H, R, Dv]."""
    xp = arrays.namespace(v)
    v = v[:, :, : chunk.scores.shape[-1]]
    batch, kv_heads, group, num_rows, n = chunk.scores.shape
    if n == 0:
        return arrays.full((batch, kv_heads * group, num_rows, v.shape[-1]), 0, v.dtype, v)
    parts = [(xp.where(chunk.kept, chunk.scores, -xp.inf), v)]
    if p.rule.tail == "centroid" and not p.keeps_all and n >= BLOCK:
        centroids = xp.swapaxes(_blocks(xp.swapaxes(v, 2, 3)).mean(-1), 2, 3)
        parts.append((block_logits(p, chunk, chunk.kept), centroids))
    peak = arrays.maximum([xp.amax(logits, -1) for logits, _ in parts])[..., None]
    peak = xp.where(peak == -xp.inf, 0, peak)
    out: Array = 0
    total: Array = 0
    for logits, values in parts:
        weights = xp.exp(logits - peak)
        total = total + xp.sum(weights, -1)[..., None]
        rows = (batch, kv_heads, group * num_rows, weights.shape[-1])
        out = out + _weighted(weights.reshape(rows), (logits > -xp.inf).reshape(rows), values)
    total = xp.where(total == 0, 1, total)  # an empty row stays zero
    return (out.reshape(batch, kv_heads, group, num_rows, v.shape[-1]) / total).reshape(
        batch, kv_heads * group, num_rows, v.shape[-1]
    )


def _weighted(weights: Array, used: Array, values: Array) -> Array:
    """weights @ values over what is `used`: elsewhere zero times infinity or NaN is zero."""
    xp = arrays.namespace(values)
    finite = xp.isfinite(values)
    if bool(finite.all()):
        return xp.matmul(weights, values)
    used = arrays.cast(used | xp.isnan(weights), values.dtype)
    parts = [xp.matmul(weights, xp.where(finite, values, 0))]
    for x, found in ((xp.inf, values == xp.inf), (-xp.inf, values == -xp.inf), (xp.nan, xp.isnan(values))):
        parts.append(xp.where(xp.matmul(used, arrays.cast(found, values.dtype)) > 0, x, 0.0))
    return sum(parts[1:], parts[0])


def block_logits(p: Problem, chunk: Chunk, kept: Array) -> Array:
    """For each row and aligned block of 64 keys, log n + mean score of the n keys that are not in `kept` (for
    tiles: of all keys): [B, Hkv, G, R, n/64]. -inf where there are none, or not all are allowed."""
    xp = arrays.namespace(chunk.raw)

    def mean_score(x: Array) -> Array:
        if p.rule.tile:
            return _blocks(x).mean(-1)
        return xp.sum(xp.where(dropped, _blocks(x), 0), -1) / xp.where(count == 0, 1, count)

    allowed = _blocks(chunk.allowed)
    dropped = allowed & ~_blocks(kept)
    count = arrays.cast(xp.sum(dropped, -1), chunk.raw.dtype)
    mean = _softcap(mean_score(chunk.raw), p.softcap)
    if chunk.bias is not None:
        mean = mean + mean_score(chunk.bias)
    summarised = allowed.all(-1) & (count > 0)
    return xp.where(summarised, mean + xp.log(xp.where(count == 0, 1, count)), -xp.inf)


def _blocks(x: Array) -> Array:
    """The last axis in aligned blocks of 64 keys, without what is left: [..., n/64, 64]."""
    num_blocks = x.shape[-1] // BLOCK
    return x[..., : num_blocks * BLOCK].reshape(*x.shape[:-1], num_blocks, BLOCK)


def _softcap(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * arrays.namespace(scores).tanh(scores / cap)


def _split_heads(x: Array, kv_heads: int) -> Array:
    """[B, H, ...] to [B, Hkv, G, ...]; a head axis of 1 stays broadcastable."""
    heads = (1, 1) if x.shape[1] == 1 else (kv_heads, x.shape[1] // kv_heads)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])
