"""The GPU passes of `triton_prefill`, in Triton. Shapes and the order of the passes are described there.

Columns: a program that works on query rows has those of `TQ` positions and of all heads of one key head's
group at once; column c is position c % TQ and head c // TQ, where heads are padded to a power of two.
Scores are in base 2: scale * log2(e) * q.k, so that exp2 and log2 do for exp and log.

Without RANGES every row sees all positions up to its own. With RANGES a mask lets it see the keys [start,
stop) of `starts` and `stops`, int32 [B, Tq]. Two tables follow from these: `tiles`, int32 [B, tiles, 2], has
the keys [low, window) that a tile chooses from, and `seen`, int32 [B, 2], those that any row sees. A row that
sees anything sees a key at or after the window of its tile: of the keys before that, all from its start on.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
BLOCK: tl.constexpr = tl.constexpr(64)  # keys of a centroid
# Largest number of queries and keys in few bits: products over 256 channels are then below float16's 65504.
LIMIT: tl.constexpr = tl.constexpr(14.0)
FLOOR: tl.constexpr = tl.constexpr(-31745)  # float16's -inf, as `_ordered` has it: below every score
NOTHING: tl.constexpr = tl.constexpr(-1e30)
PAST: tl.constexpr = tl.constexpr(1 << 30)  # after every key


# ---- Keys in few bits, and the means of blocks


@triton.jit
def _unit(x, room: tl.constexpr):
    """What makes numbers of few bits of numbers like the sample `x`, with room for `room` times its largest.
    A power of two: what is rounded does not depend on it."""
    size = tl.abs(x)
    largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    return tl.exp2(tl.floor(tl.log2(1.0 / tl.maximum(largest, 1e-20) * (LIMIT / room))))


@triton.jit
def _few_bits(x, exists, dtype: tl.constexpr, PADDED: tl.constexpr):
    """Numbers like the sample's, in few bits. PADDED: that some do not exist is known when this is compiled.
    These are zeros that are put in after the conversion, for ptxas (of CUDA 12.8) packs two converted
    constants that are equal with what happens to be in a register."""
    y = tl.clamp(x, -LIMIT, LIMIT).to(dtype)
    return tl.where(exists, y, tl.zeros_like(y)) if PADDED else y


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_blocks"])
def prepare(
    q, k, v, low, k_mean, low_mean, v_mean, units, seen,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    kv_heads, num_queries, num_keys, padded, num_blocks,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCKS: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Of BLOCKS blocks: the keys, centred, in the low-precision type; the means of keys and of values.

    The centre and the units are those of 64 sampled queries and of 64 sampled keys, with RANGES of those that
    rows see. Centring adds the same to all scores of a row.
    """
    ROWS: tl.constexpr = BLOCK * BLOCKS
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, dv, sampled = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, 64).to(tl.int64)
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    v += which // kv_heads * v_batch + which % kv_heads * v_head
    key = sampled * num_keys // 64
    if RANGES:
        start = tl.load(seen + which // kv_heads * 2)
        key = start + sampled * (tl.load(seen + which // kv_heads * 2 + 1) - start) // 64
    at = key * k_token
    sample = tl.load(k + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0).to(tl.float32)
    sample = tl.where(tl.abs(sample) < float("inf"), sample, 0.0)
    centre = tl.sum(sample, 0) / 64
    scale = _unit(sample - centre[None, :], 4)
    if part == 0:
        q += which // kv_heads * q_batch + which % kv_heads * G * q_head
        at = sampled % G * q_head + sampled * num_queries // 64 * q_token
        sample = tl.load(q + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0).to(tl.float32)
        tl.store(units + which * 2, scale)
        tl.store(units + which * 2 + 1, _unit(sample, 16))
    rows = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = part * BLOCKS + tl.arange(0, BLOCKS)
    inside = (rows < num_keys)[:, None]
    x = tl.load(k + rows[:, None] * k_token + d[None, :], mask=inside & (d < D)[None, :], other=0)
    x = x.to(tl.float32)
    y = _few_bits((x - centre[None, :]) * scale, (d < D)[None, :], low.dtype.element_ty, D < BD)
    tl.store(low + (which * padded + rows[:, None]) * BD + d[None, :], y)
    mean = tl.sum(tl.reshape(x, [BLOCKS, BLOCK, BD]), 1) / BLOCK
    y = _few_bits((mean - centre[None, :]) * scale, (d < D)[None, :], low.dtype.element_ty, D < BD)
    at_block = which * (padded // BLOCK) + b[:, None]
    tl.store(low_mean + at_block * BD + d[None, :], y)
    whole = (b < num_blocks)[:, None]
    at_block = which * num_blocks + b[:, None]
    tl.store(
        k_mean + at_block * D + d[None, :], mean.to(k_mean.dtype.element_ty), mask=whole & (d < D)[None, :]
    )
    y = tl.load(v + rows[:, None] * v_token + dv[None, :], mask=inside & (dv < DV)[None, :], other=0)
    mean = tl.sum(tl.reshape(y.to(tl.float32), [BLOCKS, BLOCK, BDV]), 1) / BLOCK
    tl.store(
        v_mean + at_block * DV + dv[None, :],
        mean.to(v_mean.dtype.element_ty),
        mask=whole & (dv < DV)[None, :],
    )


@triton.jit
def _queries(
    q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries,
    G: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The query rows at positions [start, start + TQ): [columns, BD], their positions, and which exist."""
    c = tl.arange(0, TQ * GP)
    position, head = start + c % TQ, c // TQ
    row = position - first
    exists = (row >= 0) & (row < num_queries) & (head < G)
    d = tl.arange(0, BD)
    at = which // kv_heads * q_batch + (which % kv_heads * G + head) * q_head + row.to(tl.int64) * q_token
    x = tl.load(q + at[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0)
    return x, position, exists


@triton.jit
def _range(starts, stops, at, position, exists, RANGES: tl.constexpr):
    """The first and the last key that rows see. Those of a row that sees nothing: PAST and -1."""
    begin, last = tl.zeros_like(position), position
    if RANGES:
        begin = tl.load(starts + at, mask=exists, other=0)
        last = tl.load(stops + at, mask=exists, other=0) - 1
        begin = tl.where(begin <= last, begin, PAST)
    return begin, last


@triton.jit
def _sees(j, begin, last, RANGES: tl.constexpr):
    """Which rows see which keys: [rows, keys]."""
    seen = j[None, :] <= last[:, None]
    if RANGES:
        seen = seen & (j[None, :] >= begin[:, None])
    return seen


@triton.jit
def _candidates(tiles, at, start, WINDOW: tl.constexpr, RANGES: tl.constexpr):
    """The keys [low, window) that the tile at position `start` chooses from."""
    low, window = 0, tl.maximum(start - WINDOW + 1, 0)
    if RANGES:
        low, window = tl.load(tiles + at * 2), tl.load(tiles + at * 2 + 1)
    return low, window


@triton.jit
def _factor(units, which, scale):
    """What makes base-2 scores of products in few bits."""
    return 1.0 / (tl.load(units + which * 2) * tl.load(units + which * 2 + 1)) * (scale * LOG2E)


# ---- What a row's softmax adds up to


@triton.jit
def _accumulate(peak, total, scores):
    """The running log2-sum-exp2 of rows, as its largest term and the sum relative to it."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)


@triton.jit(do_not_specialize=["num_queries", "first"])
def normalise(
    q, low, low_mean, units, low_q, normaliser, starts, stops,
    q_batch, q_head, q_token, kv_heads, num_queries, padded, first, scale,
    G: tl.constexpr, T: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Queries in few bits, and log2-sum-exp2 of every row, estimated: the first and the last blocks key by
    key, those between by their means."""
    program, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = first // T * T + program * TQ
    x, position, exists = _queries(
        q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries, G, TQ, GP, D, BD
    )
    d, n = tl.arange(0, BD), tl.arange(0, BN)
    x = x.to(tl.float32) * tl.load(units + which * 2 + 1)
    x = _few_bits(x, exists[:, None] & (d < D)[None, :], low.dtype.element_ty, G < GP or D < BD)
    factor = _factor(units, which, scale)
    at = (which * tl.num_programs(0) + program) * TQ * GP + tl.arange(0, TQ * GP)
    tl.store(low_q + at[:, None] * BD + d[None, :], x)
    low += which * padded * BD
    low_mean += which * (padded // BLOCK) * BD
    row = which // kv_heads * num_queries + position - first
    begin, last = _range(starts, stops, row, position, exists, RANGES)
    block, least, end = 0, start, start + TQ
    if RANGES:
        end = tl.max(last, 0) + 1
        least = tl.minimum(tl.min(tl.where(last >= 0, last, PAST), 0), end)
        block = tl.minimum(tl.min(begin, 0), end) // BLOCK
    # Blocks between `block` and `means` are taken by their means. Those from `means` on hold the last 64 keys
    # of every row, or all that it sees after `block`.
    means = tl.maximum((least - BLOCK + 1) // BLOCK, block + 1)
    peak = tl.full([TQ * GP], NOTHING, tl.float32)
    total = tl.zeros([TQ * GP], tl.float32)
    for s in range(block * BLOCK, block * BLOCK + BLOCK, BN):
        j = s + n
        y = tl.load(low + j.to(tl.int64)[None, :] * BD + d[:, None])
        scores = tl.where(_sees(j, begin, last, RANGES), tl.dot(x, y) * factor, NOTHING)
        peak, total = _accumulate(peak, total, scores)
    for s in range(means * BLOCK, end, BN):
        j = s + n
        y = tl.load(low + tl.minimum(j, padded - 1).to(tl.int64)[None, :] * BD + d[:, None])
        scores = tl.where(_sees(j, begin, last, RANGES), tl.dot(x, y) * factor, NOTHING)
        peak, total = _accumulate(peak, total, scores)
    for s in range(block + 1, means, BN):
        b = s + n
        y = tl.load(low_mean + tl.minimum(b, padded // BLOCK - 1)[None, :] * BD + d[:, None])
        inside = (b < means)[None, :]
        if RANGES:
            inside = inside & ((b * BLOCK)[None, :] >= begin[:, None])
        scores = tl.where(inside, tl.dot(x, y) * factor + 6.0, NOTHING)  # log2 of BLOCK
        peak, total = _accumulate(peak, total, scores)
    tl.store(normaliser + at, tl.where(exists & (last >= 0), peak + tl.log2(total), 1e30))


# ---- The scores of keys for a tile


@triton.jit(do_not_specialize=["num_queries", "first", "slab", "all_programs"])
def score(
    low_q, low, units, normaliser, scores, groups, starts, stops, tiles,
    kv_heads, num_queries, padded, first, slab, all_programs, scale,
    T: tl.constexpr, TQ: tl.constexpr, POSITIONS: tl.constexpr, GP: tl.constexpr, BD: tl.constexpr,
    WINDOW: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, RANGES: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """Of each key before the window of the tile: the largest share of the softmax that any of the columns
    gives it, as a logarithm. Keys are the rows of the product, so that the maximum over columns stays within
    a thread and its neighbours, and it is made in 16 bits, so that one instruction does two. With GROUP, also
    the largest of every GROUP keys.

    With RANGES it is launched twice: for the keys that all columns see that see any, and with HIDDEN for the
    keys before these. In one loop the registers of the mask would slow all down."""
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    program = slab + local
    start = first // T * T + program * TQ
    d, n = tl.arange(0, BD), tl.arange(0, BN)
    at = (which * all_programs + program) * TQ * GP + tl.arange(0, TQ * GP)
    x = tl.trans(tl.load(low_q + at[:, None] * BD + d[None, :]))
    factor = _factor(units, which, scale)
    shift = tl.load(normaliser + at) / factor
    table = which // kv_heads * (all_programs // (T // TQ)) + program // (T // TQ)
    free, end = _candidates(tiles, table, start // T * T, WINDOW, RANGES)
    row = which * tl.num_programs(0) + local
    scores += row * padded
    keys = low + which * padded * BD + n[:, None] * BD + d[None, :]
    if RANGES:
        c = tl.arange(0, TQ * GP)  # in the order of `normalise`, whose programs have POSITIONS positions
        position = start + c // (POSITIONS * GP) * POSITIONS + c % POSITIONS
        exists = (position >= first) & (position < first + num_queries)
        at = which // kv_heads * num_queries + position - first
        begin, _ = _range(starts, stops, at, position, exists, RANGES)
        counts = begin < end  # columns that see some of these keys
        shift = tl.where(counts, shift, 60000.0)
        least = tl.min(begin, 0)
        most = tl.where(least < end, tl.max(tl.where(counts, begin, 0), 0), end)
        hidden = free // BN * BN
        free = tl.maximum((most + BN - 1) // BN * BN, hidden)
        if HIDDEN:
            free, end = hidden, free
        keys += free.to(tl.int64) * BD
    shift = tl.clamp(shift, -60000.0, 60000.0).to(tl.float16)
    for s in tl.range(free, end, BN, num_stages=STAGES):
        product = tl.dot(tl.load(keys), x, out_dtype=tl.float16) - shift[None, :]
        if HIDDEN:
            product = tl.where((s + n)[:, None] >= begin[None, :], product, float("-inf"))
        best = tl.maximum(tl.max(product, 1).to(tl.float32) * factor, -60000.0)
        if HIDDEN:
            best = tl.where(s + n >= least, best, float("-inf"))
        tl.store(scores + s + n, best.to(tl.float16))
        if GROUP:
            best = tl.max(tl.reshape(best, [BN // GROUP, GROUP]), 1)
            of_groups = row * (padded // GROUP) + s // GROUP + tl.arange(0, BN // GROUP)
            tl.store(groups + of_groups, best.to(tl.float16))
        keys += BN * BD


# ---- The best of them


@triton.jit
def _ordered(x):
    """float16 as an int32 that orders as the numbers do, above FLOOR."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, -32769 - bits, bits)


@triton.jit
def _kth(x, K):
    """The K-th largest of a matrix of `_ordered` numbers, two bits at a time."""
    low = tl.full([], FLOOR, tl.int32)
    for r in tl.static_range(8):
        step = 1 << (14 - 2 * r)
        counts = (x >= low + step).to(tl.int32) + ((x >= low + 2 * step).to(tl.int32) << 16)
        counts = tl.sum(tl.sum(counts, 1), 0)
        third = tl.sum(tl.sum((x >= low + 3 * step).to(tl.int32), 1), 0)
        up = tl.where(counts & 0xFFFF >= K, 1, 0)
        up = tl.where((counts >> 16) & 0xFFFF >= K, 2, up)
        low += tl.where(third >= K, 3, up) * step
    return low


@triton.jit
def _choose(x, K):
    """The K largest of a matrix of `_ordered` numbers, fewer where fewer are above FLOOR; equals by their
    order, row by row. Returns which they are, their places in a list, how many of each row, and of all."""
    kth = _kth(x, K)
    real = x > FLOOR
    # Those above the K-th in the lower 16 bits, those equal to it in the upper.
    counts = (real & (x > kth)).to(tl.int32) + ((real & (x == kth)).to(tl.int32) << 16)
    of_row = tl.sum(counts, 1)
    before = (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(counts, 1) - counts
    total = tl.sum(of_row, 0)
    room = K - (total & 0xFFFF)
    equals = (before >> 16) & 0xFFFF
    chosen = ((counts & 1) > 0) | ((counts > 0xFFFF) & (equals < room))
    place = (before & 0xFFFF) + tl.minimum(equals, room)
    of_row = tl.sum(chosen.to(tl.int32), 1)
    return chosen, place, of_row, (total & 0xFFFF) + tl.minimum((total >> 16) & 0xFFFF, room)


@triton.jit
def _largest_of(source, at, mask, row_size, SUBS: tl.constexpr):
    """The largest of the scores that the parts of a tile give to the same keys, `_ordered`."""
    x = tl.load(source + at, mask=mask, other=0)
    for s in tl.static_range(1, SUBS):
        x = tl.maximum(x, tl.load(source + s * row_size + at, mask=mask, other=0))
    return tl.where(mask, _ordered(x), FLOOR)


@triton.jit(do_not_specialize=["first", "slab", "all_tiles"])
def choose(
    scores, groups, lists, counts, hits, tail, tiles, kv_heads, padded, first, slab, all_tiles,
    T: tl.constexpr, SUBS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SINK_SLOTS: tl.constexpr, K: tl.constexpr,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    RANGES: tl.constexpr,
):  # fmt: skip
    """The list of a tile: its K best keys in rising order, then the sinks. And of each block log2 of the
    number of keys that are neither in the list nor in the window, which the tail needs.

    With GROUPS, the groups of GROUP keys are chosen first by their largest scores: the K best keys are in
    the K best groups (one may be there for a sink or a key of the window: then one near the K-th is lost).
    `hits` has a byte for each block.
    """
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = slab + local
    table = which // kv_heads * all_tiles + tile
    low, end = _candidates(tiles, table, (first // T + tile) * T, WINDOW, RANGES)
    scores += (which * tl.num_programs(0) + local) * SUBS * padded
    lists += (which * all_tiles + tile) * SIZE
    words = padded // (4 * BLOCK)
    hits += (which * all_tiles + tile) * words
    w, r, e = tl.arange(0, WORDS), tl.arange(0, ROWS), tl.arange(0, GROUP)
    tl.store(hits + w, tl.zeros([WORDS], tl.int32), mask=w < words)
    if GROUPS:
        groups += (which * tl.num_programs(0) + local) * SUBS * (padded // GROUP)
        g = tl.arange(0, GROUPS // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = (g * GROUP < end) & (g * GROUP + GROUP > SINKS)
        if RANGES:
            inside = inside & (g * GROUP + GROUP > low)
        x = _largest_of(groups, g, inside, padded // GROUP, SUBS)
        chosen, place, _, count = _choose(x, K)
        tl.store(lists + place, g, mask=chosen)
        tl.debug_barrier()
        inside = r < count
        group = tl.load(lists + r, mask=inside, other=0)
    else:
        inside = r * GROUP < end
        group = r
    j = group[:, None] * GROUP + e[None, :]
    candidates = inside[:, None] & (j < end) & (j >= SINKS)
    if RANGES:
        candidates = candidates & (j >= low)
    x = _largest_of(scores, j, candidates, padded, SUBS)
    tl.debug_barrier()
    chosen, place, of_row, count = _choose(x, K)
    tl.store(lists + place, j, mask=chosen)
    block = group // (BLOCK // GROUP)
    tl.atomic_add(hits + block // 4, of_row << (block % 4 * 8), mask=of_row > 0, sem="relaxed")
    sinks = tl.minimum(SINKS, end)
    if SINKS:
        s = tl.arange(0, SINK_SLOTS)
        tl.store(lists + count + s, s, mask=s < sinks)
    tl.store(counts + which * all_tiles + tile, count + sinks)
    tl.debug_barrier()
    b = tl.arange(0, 4 * WORDS)
    four = tl.load(hits + b // 4, mask=b // 4 < words, other=0, volatile=True)
    dropped = ((four >> (b % 4 * 8)) & 0xFF) * -1 + BLOCK
    dropped -= tl.minimum(tl.maximum(sinks - b * BLOCK, 0), BLOCK)
    dropped -= tl.minimum(tl.maximum(b * BLOCK + BLOCK - end, 0), BLOCK)
    size = tl.where(dropped > 0, tl.log2(tl.maximum(dropped, 1).to(tl.float32)), -60000.0)
    at = (which * all_tiles + tile) * (padded // BLOCK) + b
    tl.store(tail + at, size.to(tl.float16), mask=b < padded // BLOCK)


# ---- Attention over the list, the window and the tail


@triton.jit
def _attend(values, peak, total, acc, scores):
    """One step of the softmax over more keys."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights, fading = tl.exp2(scores - higher[:, None]), tl.exp2(peak - higher)
    total = total * fading + tl.sum(weights, 1)
    return higher, total, tl.dot(weights.to(values.dtype), values, acc * fading[:, None])


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "num_blocks",
        "first",
        "all_tiles",
    ]
)
def attend(
    q, k, v, k_mean, v_mean, lists, counts, tail, out, starts, stops, tiles,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    kv_heads, num_queries, num_keys, padded, num_blocks, first, all_tiles, scale,
    G: tl.constexpr, T: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, INT64: tl.constexpr,
    RANGES: tl.constexpr,
):  # fmt: skip
    """Softmax attention of the columns at TQ positions over what their tile keeps."""
    program, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = first // T * T + program * TQ
    tile = program // (T // TQ)
    x, position, exists = _queries(
        q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries, G, TQ, GP, D, BD
    )
    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    v += which // kv_heads * v_batch + which % kv_heads * v_head
    lists += (which * all_tiles + tile) * SIZE
    count = tl.load(counts + which * all_tiles + tile)
    table = which // kv_heads * all_tiles + tile
    _, window = _candidates(tiles, table, start // T * T, WINDOW, RANGES)
    at = which // kv_heads * num_queries + position - first
    begin, last = _range(starts, stops, at, position, exists, RANGES)
    end = tl.minimum(start + TQ, num_keys)
    if RANGES:
        end = tl.max(last, 0) + 1
    factor = scale * LOG2E
    peak = tl.full([TQ * GP], NOTHING, tl.float32)
    total = tl.zeros([TQ * GP], tl.float32)
    acc = tl.zeros([TQ * GP, BDV], tl.float32)
    for s in range(0, count, BN):
        inside = s + n < count
        j = tl.load(lists + s + n, mask=inside, other=0)
        if INT64:
            j = j.to(tl.int64)
        y = tl.load(k + j[None, :] * k_token + d[:, None], mask=(d < D)[:, None], other=0)
        seen = inside[None, :]
        if RANGES:
            seen = seen & (j[None, :] >= begin[:, None])
        scores = tl.where(seen, tl.dot(x, y) * factor, NOTHING)
        values = tl.load(v + j[:, None] * v_token + dv[None, :], mask=(dv < DV)[None, :], other=0)
        peak, total, acc = _attend(values, peak, total, acc, scores)
    for s in range(window, end, BN):
        j = s + n
        if INT64:
            j = j.to(tl.int64)
        inside = j < num_keys
        y = tl.load(k + j[None, :] * k_token + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0)
        scores = tl.where(_sees(j, begin, last, RANGES), tl.dot(x, y) * factor, NOTHING)
        values = tl.load(
            v + j[:, None] * v_token + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0
        )
        peak, total, acc = _attend(values, peak, total, acc, scores)
    if TAIL:
        tail += (which * all_tiles + tile) * (padded // BLOCK)
        k_mean += which * num_blocks * D
        v_mean += which * num_blocks * DV
        if RANGES:
            below = tl.min(begin, 0) // BLOCK
            blocks = end // BLOCK
        else:
            below = window // BLOCK // BN * BN  # these blocks every row sees whole
            for s in range(0, below, BN):
                b = s + n
                y = tl.load(k_mean + b[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0)
                scores = tl.dot(x, y) * factor + tl.load(tail + b).to(tl.float32)[None, :]
                values = tl.load(v_mean + b[:, None] * DV + dv[None, :], mask=(dv < DV)[None, :], other=0)
                peak, total, acc = _attend(values, peak, total, acc, scores)
            blocks = tl.minimum((start + TQ) // BLOCK, num_blocks)
        for s in range(below, blocks, BN):
            b = s + n
            inside = b < blocks
            y = tl.load(
                k_mean + b[None, :] * D + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0
            )
            scores = tl.dot(x, y) * factor + tl.load(tail + b, mask=inside, other=0).to(tl.float32)[None, :]
            whole = inside[None, :] & ((b * BLOCK + BLOCK - 1)[None, :] <= last[:, None])
            if RANGES:
                whole = whole & ((b * BLOCK)[None, :] >= begin[:, None])
            scores = tl.where(whole, scores, NOTHING)
            values = tl.load(
                v_mean + b[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0
            )
            peak, total, acc = _attend(values, peak, total, acc, scores)
    row, head = position - first, tl.arange(0, TQ * GP) // TQ
    at = which // kv_heads * o_batch + (which % kv_heads * G + head) * o_head + row.to(tl.int64) * o_token
    result = acc / total[:, None]
    if RANGES:
        result = tl.where((last >= 0)[:, None], result, 0.0)
    result = result.to(out.dtype.element_ty)
    tl.store(out + at[:, None] + dv[None, :], result, mask=exists[:, None] & (dv < DV)[None, :])
