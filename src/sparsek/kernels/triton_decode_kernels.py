"""The GPU passes of `triton_decode`, in Triton. Shapes and the order of the passes are described there.

Columns: the query rows of the heads of one key head's group, padded to COLUMNS, which is the least that a
product takes. Scores are in base 2. What a step sees begins at `starts[b]` and ends at `lengths[b]`, which
are read on the GPU, so that a CUDA graph can be replayed while a cache grows.

With OVERLAP (from compute capability 9.0 on) a pass starts before the one before it has ended, and waits for
it where it needs what that made. Every program waits, also one with nothing to do: so a pass that has ended
means that all before it have.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_kernels import BLOCK, LOG2E, NOTHING, _accumulate, _attend

COLUMNS: tl.constexpr = tl.constexpr(16)
BINS: tl.constexpr = tl.constexpr(512)  # of the histogram of shares
PER_BIT: tl.constexpr = tl.constexpr(16)  # bins for a factor of two


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """For the pass before this one to end."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def _go_on(OVERLAP: tl.constexpr):
    """Let the next pass start, as far as there is room."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def append(
    k, v, low, centre, unit, k_mean, v_mean, lengths,
    k_batch, k_head, k_token, v_batch, v_head, v_token, kv_heads, count, capacity,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The last `count` tokens of a cache into the index: keys in 4 bits, two channels BD / 2 apart in a byte,
    and the means of the blocks that are complete now."""
    HALF: tl.constexpr = BD // 2
    which = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + which // kv_heads)
    fresh = tl.maximum(length - count, 0)
    block = fresh // BLOCK + tl.program_id(0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    exists = (j < length) & (j < capacity)
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    v += which // kv_heads * v_batch + which % kv_heads * v_head
    key, value = k + j.to(tl.int64)[:, None] * k_token, v + j.to(tl.int64)[:, None] * v_token
    at = which * capacity + j
    mean_at = which * (capacity // BLOCK) + block
    end = block * BLOCK + BLOCK
    complete = (end <= length) & (end > fresh) & (end <= capacity)
    d, dv = tl.arange(0, HALF), tl.arange(0, BDV)
    packed = tl.zeros([BLOCK, HALF], tl.int32)
    for half in tl.static_range(2):
        c = half * HALF + d
        x = tl.load(key + c[None, :], mask=exists[:, None] & (c < D)[None, :], other=0).to(tl.float32)
        mean = tl.sum(x, 0) * (1.0 / BLOCK)
        tl.store(k_mean + mean_at * D + c, mean.to(k_mean.dtype.element_ty), mask=complete & (c < D))
        level = (x - tl.load(centre + which * BD + c)[None, :]) / tl.load(unit + which * BD + c)[None, :]
        packed += tl.clamp(level + 8.0, 0.0, 15.0).to(tl.int32) << (4 * half)
    tl.store(
        low + at[:, None] * HALF + d[None, :], packed.to(tl.uint8), mask=(exists & (j >= fresh))[:, None]
    )
    y = tl.load(value + dv[None, :], mask=exists[:, None] & (dv < DV)[None, :], other=0).to(tl.float32)
    mean = tl.sum(y, 0) * (1.0 / BLOCK)
    tl.store(v_mean + mean_at * DV + dv, mean.to(v_mean.dtype.element_ty), mask=complete & (dv < DV))


@triton.jit
def _step_queries(q, which, kv_heads, q_batch, q_head, d, G: tl.constexpr, D: tl.constexpr):
    """The query rows of a key head: [COLUMNS, size of d]."""
    head = tl.arange(0, COLUMNS)
    at = which // kv_heads * q_batch + (which % kv_heads * G + head) * q_head
    return tl.load(q + at[:, None] + d[None, :], mask=(head < G)[:, None] & (d < D)[None, :], other=0)


@triton.jit
def _span(lengths, starts, batch, T: tl.constexpr, WINDOW: tl.constexpr):
    """Of a step: its first key, the end of its keys, and the first key of its window."""
    length = tl.load(lengths + batch)
    return tl.load(starts + batch), length, tl.maximum((length - 1) // T * T - WINDOW + 1, 0)


@triton.jit
def survey(
    q, k, k_mean, lengths, starts, mean_scores, norms, histogram,
    q_batch, q_head, k_batch, k_head, k_token, kv_heads, capacity, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr,
    MEANS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The scores of the means of blocks, and what the softmax of each row adds up to, estimated from them.
    The last program takes the first and the last keys one by one."""
    _go_on(OVERLAP)
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = tl.num_programs(0) - 1
    start, length, window = _span(lengths, starts, which // kv_heads, T, WINDOW)
    first_block, window_block = start // BLOCK, window // BLOCK
    d, c = tl.arange(0, BD), tl.arange(0, COLUMNS)
    x = _step_queries(q, which, kv_heads, q_batch, q_head, d, G, D)
    factor = scale * LOG2E
    highest = tl.full([COLUMNS], NOTHING, tl.float32)
    norm = tl.zeros([COLUMNS], tl.float32)
    if part < last:
        b = part * MEANS + tl.arange(0, MEANS)
        at = which * (capacity // BLOCK) + b
        exists = b * BLOCK + BLOCK <= length
        y = tl.load(k_mean + at[None, :] * D + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0)
        scores = tl.dot(x, y) * factor
        tl.store(mean_scores + at[None, :] * COLUMNS + c[:, None], scores, mask=exists[None, :])
        between = (b > first_block) & (b < window_block)
        scores = tl.where(between[None, :], scores + 6.0, NOTHING)  # log2 of BLOCK
        highest, norm = _accumulate(highest, norm, scores)
    else:
        bins = tl.arange(0, BINS)
        tl.store(histogram + which * BINS + bins, tl.zeros([BINS], tl.int32))
        k += which // kv_heads * k_batch + which % kv_heads * k_head
        # The first block, then those from the window's on.
        for i in range(1 + tl.cdiv(length - window_block * BLOCK, BLOCK)):
            j = tl.where(i == 0, first_block, window_block + i - 1) * BLOCK + tl.arange(0, BLOCK)
            seen = (j >= start) & (j < tl.where(i == 0, tl.minimum(length, window_block * BLOCK), length))
            at = j.to(tl.int64)[None, :] * k_token
            y = tl.load(k + at + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0)
            scores = tl.where(seen[None, :], tl.dot(x, y) * factor, NOTHING)
            highest, norm = _accumulate(highest, norm, scores)
    at = (which * tl.num_programs(0) + part) * 2 * COLUMNS + c
    tl.store(norms + at, highest)
    tl.store(norms + at + COLUMNS, norm)


@triton.jit
def _levels(pair, PACKED: tl.constexpr):
    """The lower and the upper 4 bits of bytes, as int8. Packed, one instruction does four bytes."""
    if PACKED:
        low = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [pair], dtype=tl.int8, is_pure=True, pack=4
        )
        high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r", [pair], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = (pair & 15).to(tl.int8), (pair >> 4).to(tl.int8)
    return low, high


@triton.jit
def score(
    q, low, centre, unit, norms, lengths, starts, shares, histogram, of_part,
    q_batch, q_head, kv_heads, capacity, num_norms, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, NORMS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of each key of a chunk the largest share of the softmax that a row gives it, as a logarithm; the
    histogram of these over the candidates, of all chunks together and of this one."""
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, _, window = _span(lengths, starts, which // kv_heads, T, WINDOW)
    HALF: tl.constexpr = BD // 2
    d, n, c = tl.arange(0, HALF), tl.arange(0, BN), tl.arange(0, COLUMNS)
    # Rows in 8 bits, in units of the keys' levels. A key is centre + (level - 7.5) * unit.
    x = _step_queries(q, which, kv_heads, q_batch, q_head, d, G, D).to(tl.float32)
    y = _step_queries(q, which, kv_heads, q_batch, q_head, HALF + d, G, D).to(tl.float32)
    centre += which * BD
    unit += which * BD
    shift = tl.sum(x * tl.load(centre + d)[None, :] + y * tl.load(centre + HALF + d)[None, :], 1)
    x *= tl.load(unit + d)[None, :]
    y *= tl.load(unit + HALF + d)[None, :]
    largest = tl.maximum(tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 1), 1e-30) * (1.0 / 127)
    x, y = tl.floor(x / largest[:, None] + 0.5), tl.floor(y / largest[:, None] + 0.5)
    factor = largest * (scale * LOG2E)
    shift = shift * (scale * LOG2E) - tl.sum(x + y, 1) * 7.5 * factor
    _wait(OVERLAP)
    if part * CHUNK < window:
        p = tl.arange(0, NORMS)
        at = (which * num_norms + p)[:, None] * 2 * COLUMNS + c[None, :]
        peak = tl.load(norms + at, mask=(p < num_norms)[:, None], other=-1e30)
        total = tl.load(norms + at + COLUMNS, mask=(p < num_norms)[:, None], other=0)
        highest = tl.max(peak, 0)
        norm = highest + tl.log2(tl.sum(total * tl.exp2(peak - highest[None, :]), 0))
        shift = tl.where(c < G, shift - norm, -1e30)
        columns, others = tl.trans(x.to(tl.int8)), tl.trans(y.to(tl.int8))
        shares += which * capacity + part * CHUNK
        keys = low + (which * capacity + part * CHUNK + n[:, None]) * HALF + d[None, :]
        for s in tl.range(0, CHUNK, BN, num_stages=STAGES):
            first, second = _levels(tl.load(keys), PACKED)
            product = tl.dot(first, columns, out_dtype=tl.int32)
            product = tl.dot(second, others, product, out_dtype=tl.int32)
            share = tl.max(product.to(tl.float32) * factor[None, :] + shift[None, :], 1)
            tl.store(shares + s + n, tl.maximum(share, -60000.0).to(tl.float16))
            keys += BN * HALF
        _go_on(OVERLAP)
        tl.debug_barrier()
        r = tl.arange(0, CHUNK)
        j = part * CHUNK + r
        bins = _bin(tl.load(shares + r))
        counts = tl.histogram(bins, BINS, mask=(j >= tl.maximum(start, SINKS)) & (j < window))
        b = tl.arange(0, BINS)
        tl.atomic_add(histogram + which * BINS + b, counts, mask=counts > 0, sem="relaxed")
        at = (which * tl.num_programs(0) + part) * BINS + b
        tl.store(of_part + at, counts.to(tl.int16))


@triton.jit
def _bin(share):
    """Bins from the largest shares to the smallest."""
    return tl.clamp(share.to(tl.float32) * -PER_BIT, 0.0, BINS - 1.0).to(tl.int32)


@triton.jit
def _chosen(
    shares, histogram, of_part, which, part, parts, capacity, start, window,
    SINKS: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Which keys of a chunk are among the K best and in bins up to the LAST, as a matrix with a row for each
    block, and their places in a list. The histogram tells where the K-th best is; of equals the first are
    taken."""
    bins = tl.arange(0, BINS)
    up_to = tl.cumsum(tl.load(histogram + which * BINS + bins), 0)
    edge = tl.minimum(tl.sum((up_to < K).to(tl.int32), 0), LAST + 1)  # the bin of the K-th best
    room = K - tl.max(tl.where(bins < edge, up_to, 0), 0)
    p = tl.arange(0, PARTS)
    at = (which * parts + p) * BINS + edge
    equals = tl.load(of_part + at, mask=(p < part) & (edge < BINS), other=0).to(tl.int32)
    room = tl.where(edge <= LAST, tl.maximum(room - tl.sum(equals, 0), 0), 0)
    i = tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    j = part * CHUNK + i
    bin_of = _bin(tl.load(shares + which * capacity + j))
    candidate = (j >= tl.maximum(start, SINKS)) & (j < window)
    above, equal = candidate & (bin_of < edge), candidate & (bin_of == edge)
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    of_row = tl.sum(counts, 1)
    before = (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(counts, 1) - counts
    chosen = above | (equal & (before >> 16 < room))
    return j, chosen, (before & 0xFFFF) + tl.minimum(before >> 16, room)


@triton.jit
def _attend_keys(
    x, k, v, key, inside, d, dv, k_token, v_token, factor, peak, total, acc, D: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """One step of the softmax, over some keys."""
    key = key.to(tl.int64)
    y = tl.load(k + key[None, :] * k_token + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0)
    scores = tl.where(inside[None, :], tl.dot(x, y) * factor, NOTHING)
    values = tl.load(
        v + key[:, None] * v_token + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0
    )
    return _attend(values, peak, total, acc, scores, 1.0)


@triton.jit
def attend(
    q, k, v, v_mean, mean_scores, lengths, starts, shares, histogram, of_part, lists, peaks, totals, sums,
    q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, kv_heads, capacity, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    T: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr,
    TAIL: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of the rows over those of the K best keys that are in a chunk, and over the means of its
    blocks; of the last program over the sinks and the window."""
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0) - 1
    start, length, window = _span(lengths, starts, which // kv_heads, T, WINDOW)
    _wait(OVERLAP)
    if (part * CHUNK < window) | (part == parts):
        d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
        x = _step_queries(q, which, kv_heads, q_batch, q_head, d, G, D)
        k += which // kv_heads * k_batch + which % kv_heads * k_head
        v += which // kv_heads * v_batch + which % kv_heads * v_head
        factor = scale * LOG2E
        peak = tl.full([COLUMNS], NOTHING, tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        acc = tl.zeros([COLUMNS, BDV], tl.float32)
        if part == parts:
            sinks = tl.minimum(window, SINKS)
            for s in range(0, sinks + length - window, BN):
                i = s + n
                j = tl.where(i < sinks, i, i - sinks + window)
                seen = (j >= start) & (j < length)
                peak, total, acc = _attend_keys(
                    x, k, v, j, seen, d, dv, k_token, v_token, factor, peak, total, acc, D, DV
                )
        else:
            j, chosen, place = _chosen(
                shares, histogram, of_part, which, part, parts, capacity, start, window,
                SINKS, K, LAST, CHUNK, PARTS,
            )  # fmt: skip
            lists += which * capacity + part * CHUNK
            tl.store(lists + place, j, mask=chosen)
            of_row = tl.sum(chosen.to(tl.int32), 1)
            count = tl.sum(of_row, 0)
            tl.debug_barrier()
            for s in range(0, count, BN):
                inside = s + n < count
                key = tl.load(lists + s + n, mask=inside, other=0)
                peak, total, acc = _attend_keys(
                    x, k, v, key, inside, d, dv, k_token, v_token, factor, peak, total, acc, D, DV
                )
            if TAIL:
                b = part * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
                c = tl.arange(0, COLUMNS)
                dropped = BLOCK - of_row - tl.minimum(tl.maximum(SINKS - b * BLOCK, 0), BLOCK)
                dropped -= tl.minimum(tl.maximum(b * BLOCK + BLOCK - window, 0), BLOCK)
                whole = (b * BLOCK >= start) & (b * BLOCK + BLOCK <= length) & (dropped > 0)
                at = which * (capacity // BLOCK) + b
                scores = tl.load(
                    mean_scores + at[None, :] * COLUMNS + c[:, None], mask=whole[None, :], other=0
                )
                scores += tl.log2(tl.maximum(dropped, 1).to(tl.float32))[None, :]
                values = tl.load(
                    v_mean + at[:, None] * DV + dv[None, :], mask=whole[:, None] & (dv < DV)[None, :], other=0
                )
                scores = tl.where(whole[None, :], scores, NOTHING)
                peak, total, acc = _attend(values, peak, total, acc, scores, 1.0)
        _go_on(OVERLAP)
        c = tl.arange(0, COLUMNS)
        at = (which * (parts + 1) + part) * COLUMNS + c
        tl.store(peaks + at, peak)
        tl.store(totals + at, total)
        tl.store(sums + at[:, None] * DV + dv[None, :], acc, mask=(c < G)[:, None] & (dv < DV)[None, :])


@triton.jit
def combine(
    peaks, totals, sums, lengths, starts, out, o_batch, o_head, kv_heads, parts,
    G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head's output from what the programs of `attend` made."""
    head, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, _, window = _span(lengths, starts, which // kv_heads, T, WINDOW)
    dv, n = tl.arange(0, BDV), tl.arange(0, BN)
    _wait(OVERLAP)
    peak = tl.full([], NOTHING, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BDV], tl.float32)
    for s in range(0, parts + 1, BN):
        p = s + n
        made = (p * CHUNK < window) & (p < parts) | (p == parts)
        at = (which * (parts + 1) + p) * COLUMNS + head
        peaks_of = tl.load(peaks + at, mask=made, other=-1e30)
        higher = tl.maximum(peak, tl.max(peaks_of, 0))
        weights, fading = tl.exp2(peaks_of - higher), tl.exp2(peak - higher)
        total = total * fading + tl.sum(weights * tl.load(totals + at, mask=made, other=0), 0)
        x = tl.load(sums + at[:, None] * DV + dv[None, :], mask=made[:, None] & (dv < DV)[None, :], other=0)
        acc = acc * fading + tl.sum(weights[:, None] * x, 0)
        peak = higher
    at = which // kv_heads * o_batch + (which % kv_heads * G + head) * o_head + dv
    tl.store(out + at, (acc / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty), mask=dv < DV)
