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
# Largest number of queries and keys in few bits: products over 125 dimensions are then 24500 at most, with
# the digits of a threshold 57260, below float16's 65504.
LIMIT: tl.constexpr = tl.constexpr(14.0)
# A row's threshold is three further dimensions of its product: it in units of these, which are the keys'.
DIGITS: tl.constexpr = tl.constexpr(3)
HIGH: tl.constexpr = tl.constexpr(128.0)
MIDDLE: tl.constexpr = tl.constexpr(8.0)
LOW: tl.constexpr = tl.constexpr(0.5)
UNITS: tl.constexpr = tl.constexpr(3)  # numbers of a key head
MOST: tl.constexpr = tl.constexpr(240.0)  # of a digit, and what is not 0 at least: below it bits are fewer
LEAST: tl.constexpr = tl.constexpr(0.015625)
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
def _digit(x, place: tl.constexpr):
    """The part of x that a number of few bits can say in units of `place`; and what is left. Rounded as 8
    bits round, in 32: for all to be converted at once."""
    bits = tl.clamp(x / place, -MOST, MOST).to(tl.int32, bitcast=True)
    digit = ((bits + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    digit = tl.where(tl.abs(digit) < LEAST, 0.0, digit)
    return digit, x - digit * place


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def sample(
    q, k, units, centre, picked, seen,
    q_batch, q_head, q_token, k_batch, k_head, k_token, kv_heads, num_queries, num_keys,
    G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Of 64 queries and 64 keys, with RANGES of those that rows see: the centre of the keys, the units of
    numbers in few bits, and the dimensions that choosing looks at: those BD - DIGITS with the most energy,
    E[q^2] E[k^2] with keys centred. Centring adds the same to all scores of a row. Behind the units: by
    how much less scores vary in these dimensions than in all."""
    which = tl.program_id(0).to(tl.int64)
    d, sampled = tl.arange(0, SLOTS), tl.arange(0, 64).to(tl.int64)
    exists = (d < D)[None, :]
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    key = sampled * num_keys // 64
    if RANGES:
        start = tl.load(seen + which // kv_heads * 2)
        key = start + sampled * (tl.load(seen + which // kv_heads * 2 + 1) - start) // 64
    x = tl.load(k + (key * k_token)[:, None] + d[None, :], mask=exists, other=0).to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    middle = tl.sum(x, 0) / 64
    x -= middle[None, :]
    q += which // kv_heads * q_batch + which % kv_heads * G * q_head
    at = sampled % G * q_head + sampled * num_queries // 64 * q_token
    y = tl.load(q + at[:, None] + d[None, :], mask=exists, other=0).to(tl.float32)
    y = tl.where(tl.abs(y) < float("inf"), y, 0.0)
    units += which * UNITS
    tl.store(units, _unit(x, 4))
    tl.store(units + 1, _unit(y, 16))
    # Logarithms, so that nothing is too large or too small to be compared.
    energy = tl.log2(tl.sum(x * x, 0) + 1e-30) + tl.log2(tl.sum(y * y, 0) + 1e-30)
    energy = tl.where(d < D, energy, -1e30)
    before = (energy[:, None] > energy[None, :]) | (
        (energy[:, None] == energy[None, :]) & (d[:, None] < d[None, :])
    )
    rank = tl.sum(before.to(tl.int32), 0)
    linear = tl.minimum(energy, 250.0)  # of a square that is infinite too
    linear = tl.exp2(linear - tl.max(linear, 0))
    part = tl.sum(tl.where(rank < BD - DIGITS, linear, 0.0), 0) / tl.sum(linear, 0)
    tl.store(units + 2, tl.sqrt(part * tl.sqrt(part)))  # the root of `part`, and less, for keys change ranks
    tl.store(centre + which * BD + tl.arange(0, BD), tl.zeros([BD], tl.float32))
    tl.debug_barrier()
    tl.store(picked + which * BD + rank, d, mask=rank < BD - DIGITS)
    tl.store(centre + which * BD + rank, middle, mask=(rank < BD - DIGITS) & (d < D))


@triton.jit
def _pick(x, picked, which, D: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr):
    """Of vectors of 16 bits [rows, SLOTS] the dimensions that choosing looks at, as they are: [rows, BD], 0
    in slots without one. A product with zeros and ones, as that is faster than to load single numbers."""
    d, slot = tl.arange(0, SLOTS), tl.arange(0, BD)
    exists = (slot < BD - DIGITS) & (slot < D)
    at = tl.load(picked + which * BD + slot, mask=exists, other=-1)
    return tl.dot(x, (d[:, None] == at[None, :]).to(x.dtype))


@triton.jit(do_not_specialize=["num_keys", "num_blocks"])
def prepare(
    k, v, low, k_mean, low_mean, v_mean, units, centre, picked,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    kv_heads, num_keys, padded, num_blocks,
    D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of BLOCKS blocks: the keys' picked dimensions, centred, in few bits, and behind them what the digits of
    a row's threshold are multiplied with; the means of keys, also in few bits, and of values."""
    ROWS: tl.constexpr = BLOCK * BLOCKS
    dtype: tl.constexpr = low.dtype.element_ty
    part, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, dv, slot = tl.arange(0, SLOTS), tl.arange(0, BDV), tl.arange(0, BD)
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    v += which // kv_heads * v_batch + which % kv_heads * v_head
    rows = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = part * BLOCKS + tl.arange(0, BLOCKS)
    inside = (rows < num_keys)[:, None]
    scale = tl.load(units + which * UNITS)
    keys = tl.load(k + rows[:, None] * k_token + d[None, :], mask=inside & (d < D)[None, :], other=0)
    x = _pick(keys, picked, which, D, SLOTS, BD)
    middle = tl.load(centre + which * BD + slot)
    y = tl.clamp((x - middle[None, :]) * scale, -LIMIT, LIMIT)
    last = slot - (BD - DIGITS)
    places = tl.where(last == 0, HIGH, tl.where(last == 1, MIDDLE, LOW))
    y = tl.where((last >= 0)[None, :], places[None, :], y).to(dtype)
    tl.store(low + (which * padded + rows[:, None]) * BD + slot[None, :], y)
    mean = tl.sum(tl.reshape(x, [BLOCKS, BLOCK, BD]), 1) / BLOCK
    y = tl.clamp((mean - middle[None, :]) * scale, -LIMIT, LIMIT).to(dtype)
    tl.store(low_mean + (which * (padded // BLOCK) + b[:, None]) * BD + slot[None, :], y)
    whole = (b < num_blocks)[:, None]
    at_block = which * num_blocks + b[:, None]
    mean = tl.sum(tl.reshape(keys.to(tl.float32), [BLOCKS, BLOCK, SLOTS]), 1) / BLOCK
    tl.store(
        k_mean + at_block * D + d[None, :], mean.to(k_mean.dtype.element_ty), mask=whole & (d < D)[None, :]
    )
    x = tl.load(v + rows[:, None] * v_token + dv[None, :], mask=inside & (dv < DV)[None, :], other=0)
    mean = tl.sum(tl.reshape(x.to(tl.float32), [BLOCKS, BLOCK, BDV]), 1) / BLOCK
    tl.store(
        v_mean + at_block * DV + dv[None, :],
        mean.to(v_mean.dtype.element_ty),
        mask=whole & (dv < DV)[None, :],
    )


@triton.jit
def _queries(
    q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries,
    G: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The query rows at positions [start, start + TQ): [columns, SLOTS]; their positions, and which exist."""
    d = tl.arange(0, SLOTS)
    c = tl.arange(0, TQ * GP)
    position, head = start + c % TQ, c // TQ
    row = position - first
    exists = (row >= 0) & (row < num_queries) & (head < G)
    rows = which // kv_heads * q_batch + (which % kv_heads * G + head) * q_head + row.to(tl.int64) * q_token
    x = tl.load(q + rows[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0)
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
    units += which * UNITS
    return 1.0 / (tl.load(units) * tl.load(units + 1)) * (scale * LOG2E)


# ---- What a row's softmax adds up to


@triton.jit
def _accumulate(peak, total, scores):
    """The running log2-sum-exp2 of rows, as its largest term and the sum relative to it."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)


@triton.jit(do_not_specialize=["num_queries", "first", "slab", "all_tiles", "floor"])
def normalise(
    q, low, low_mean, units, picked, low_q, starts, stops, tiles,
    q_batch, q_head, q_token, kv_heads, num_queries, padded, first, slab, all_tiles, scale, floor,
    G: tl.constexpr, T: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    SLOTS: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Queries in few bits, and as further dimensions of each the score below which no key is kept for it:
    `floor`, and log2-sum-exp2 of the row. That is an estimate: the first and the last blocks key by key,
    those between by their means. Scores in the dimensions that are looked at vary less than in all, and
    what of it is above the average is made less by as much: at least as many keys are then above."""
    local, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = low.dtype.element_ty
    start = first // T * T + (slab + local) * TQ
    x, position, exists = _queries(
        q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries, G, TQ, GP, D, SLOTS
    )
    slot, n = tl.arange(0, BD), tl.arange(0, BN)
    x = _pick(x, picked, which, D, SLOTS, BD) * tl.load(units + which * UNITS + 1)
    x = tl.clamp(x, -LIMIT, LIMIT).to(dtype)
    factor = _factor(units, which, scale)
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
        y = tl.load(low + j.to(tl.int64)[None, :] * BD + slot[:, None])
        scores = tl.where(_sees(j, begin, last, RANGES), tl.dot(x, y) * factor, NOTHING)
        peak, total = _accumulate(peak, total, scores)
    for s in range(means * BLOCK, end, BN):
        j = s + n
        y = tl.load(low + tl.minimum(j, padded - 1).to(tl.int64)[None, :] * BD + slot[:, None])
        scores = tl.where(_sees(j, begin, last, RANGES), tl.dot(x, y) * factor, NOTHING)
        peak, total = _accumulate(peak, total, scores)
    for s in range(block + 1, means, BN):
        b = s + n
        y = tl.load(low_mean + tl.minimum(b, padded // BLOCK - 1)[None, :] * BD + slot[:, None])
        inside = (b < means)[None, :]
        if RANGES:
            inside = inside & ((b * BLOCK)[None, :] >= begin[:, None])
        scores = tl.where(inside, tl.dot(x, y) * factor + 6.0, NOTHING)  # log2 of BLOCK
        peak, total = _accumulate(peak, total, scores)
    # Rows that see none of the keys before the window keep none of them, whatever others do.
    table = which // kv_heads * all_tiles + (slab + local) // (T // TQ)
    _, window = _candidates(tiles, table, start // T * T, WINDOW, RANGES)
    some = exists & (last >= 0) & (begin < window)
    wanted = peak + tl.log2(total) + floor  # above the average, which is 0, for keys are centred
    wanted = tl.where(wanted > 0, wanted * tl.load(units + which * UNITS + 2), wanted)
    least_score = tl.where(some, wanted / factor, HIGH * MOST)
    high, rest = _digit(-least_score, HIGH)
    middle, rest = _digit(rest, MIDDLE)
    small, rest = _digit(rest, LOW)
    column = (which * tl.num_programs(0) + local) * TQ * GP + tl.arange(0, TQ * GP)
    low_q += column * BD
    tl.store(low_q[:, None] + slot[None, :], x)
    # The slots of the digits once more, when all have arrived. (Put in before, even in 32 bits, they came out
    # wrong in some layouts.)
    tl.debug_barrier()
    tl.store(low_q + (BD - 3), high.to(dtype))
    tl.store(low_q + (BD - 2), middle.to(dtype))
    tl.store(low_q + (BD - 1), small.to(dtype))


# ---- The scores of keys for a tile


@triton.jit(do_not_specialize=["num_queries", "first", "slab", "all_programs"])
def score(
    low_q, low, bits, scores, groups, starts, stops, tiles,
    kv_heads, num_queries, padded, first, slab, all_programs,
    T: tl.constexpr, TQ: tl.constexpr, POSITIONS: tl.constexpr, GP: tl.constexpr, BD: tl.constexpr,
    WINDOW: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, RANGES: tl.constexpr,
    HIDDEN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Of each key before the window of the tile: by how much its score is above what is kept, at most, for
    any of the columns. Written is a bit that says whether it is; with COUNT the number, and with GROUP also
    the largest of every GROUP keys.

    Thresholds are dimensions of the product, so that all that is left is a maximum. Keys are the rows of the
    product, so that the maximum over columns stays within a thread and its neighbours, and it is made in 16
    bits, so that one instruction does two.

    With RANGES it is launched twice: for the keys that all columns see that see any, and with HIDDEN for the
    keys before these. In one loop the registers of the mask would slow all down."""
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    program = slab + local
    start = first // T * T + program * TQ
    d, n = tl.arange(0, BD), tl.arange(0, BN)
    row = which * tl.num_programs(0) + local
    column = row * TQ * GP + tl.arange(0, TQ * GP)
    x = tl.trans(tl.load(low_q + column[:, None] * BD + d[None, :]))
    table = which // kv_heads * (all_programs // (T // TQ)) + program // (T // TQ)
    free, end = _candidates(tiles, table, start // T * T, WINDOW, RANGES)
    free = free // BN * BN
    keys = low + which * padded * BD + n[:, None] * BD + d[None, :]
    if RANGES:
        c = tl.arange(0, TQ * GP)  # in the order of `normalise`, whose programs have POSITIONS positions
        position = start + c // (POSITIONS * GP) * POSITIONS + c % POSITIONS
        exists = (position >= first) & (position < first + num_queries)
        at = which // kv_heads * num_queries + position - first
        begin, _ = _range(starts, stops, at, position, exists, RANGES)
        counts = (
            begin < end
        )  # columns that see some of these keys: what `normalise` wrote of others is below all
        least = tl.min(begin, 0)
        most = tl.where(least < end, tl.max(tl.where(counts, begin, 0), 0), end)
        hidden = free
        free = tl.maximum((most + BN - 1) // BN * BN, hidden)
        if HIDDEN:
            free, end = hidden, free
        keys += free.to(tl.int64) * BD
    for s in tl.range(free, end, BN, num_stages=STAGES):
        product = tl.dot(tl.load(keys), x, out_dtype=tl.float16)
        if HIDDEN:
            product = tl.where((s + n)[:, None] >= begin[None, :], product, float("-inf"))
        best = tl.max(product, 1)
        if COUNT:
            best = tl.maximum(best, -60000.0)
            if HIDDEN:
                best = tl.where(s + n >= least, best, float("-inf"))
            tl.store(scores + row * padded + s + n, best)
            if GROUP:
                best = tl.max(tl.reshape(best, [BN // GROUP, GROUP]), 1)
                of_groups = row * (padded // GROUP) + s // GROUP + tl.arange(0, BN // GROUP)
                tl.store(groups + of_groups, best)
        else:
            words = tl.reshape((best > 0.0).to(tl.int32), [BN // 32, 32]) << tl.arange(0, 32)[None, :]
            word = s // 32 + tl.arange(0, BN // 32)
            tl.store(bits + row * (padded // 32) + word, tl.sum(words, 1))
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
def _choose(x, K, FLOOR_OF_ALL: tl.constexpr):
    """The K largest of a matrix of `_ordered` numbers, fewer where fewer are above the floor; equals by their
    order, row by row. Returns which they are, their places in a list, how many of each row, and of all."""
    kth = _kth(x, K)
    real = x > FLOOR_OF_ALL
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
    SHARE: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """The list of a tile: its K best keys in rising order, with SHARE of those above the threshold, then the
    sinks. And of each block log2 of the number of keys that are neither in the list nor in the window, which
    the tail needs.

    With GROUPS, the groups of GROUP keys are chosen first by their largest scores: the K best keys are in
    the K best groups (one may be there for a sink or a key of the window: then one near the K-th is lost).
    `hits` has a byte for each block.
    """
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = slab + local
    floor: tl.constexpr = 0 if SHARE else FLOOR
    row = which * tl.num_programs(0) + local
    table = which // kv_heads * all_tiles + tile
    low, end = _candidates(tiles, table, (first // T + tile) * T, WINDOW, RANGES)
    scores += row * SUBS * padded
    lists += row * SIZE
    words = padded // (4 * BLOCK)
    hits += row * words
    w, r, e = tl.arange(0, WORDS), tl.arange(0, ROWS), tl.arange(0, GROUP)
    tl.store(hits + w, tl.zeros([WORDS], tl.int32), mask=w < words)
    if GROUPS:
        groups += row * SUBS * (padded // GROUP)
        g = tl.arange(0, GROUPS // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = (g * GROUP < end) & (g * GROUP + GROUP > SINKS)
        if RANGES:
            inside = inside & (g * GROUP + GROUP > low)
        x = _largest_of(groups, g, inside, padded // GROUP, SUBS)
        chosen, place, _, count = _choose(x, K, floor)
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
    chosen, place, of_row, count = _choose(x, K, floor)
    tl.store(lists + place, j, mask=chosen)
    block = group // (BLOCK // GROUP)
    tl.atomic_add(hits + block // 4, of_row << (block % 4 * 8), mask=of_row > 0, sem="relaxed")
    sinks = tl.minimum(SINKS, end)
    if SINKS:
        s = tl.arange(0, SINK_SLOTS)
        tl.store(lists + count + s, s, mask=s < sinks)
    tl.store(counts + row, count + sinks)
    tl.debug_barrier()
    b = tl.arange(0, 4 * WORDS)
    four = tl.load(hits + b // 4, mask=b // 4 < words, other=0, volatile=True)
    dropped = ((four >> (b % 4 * 8)) & 0xFF) * -1 + BLOCK
    dropped -= tl.minimum(tl.maximum(sinks - b * BLOCK, 0), BLOCK)
    dropped -= tl.minimum(tl.maximum(b * BLOCK + BLOCK - end, 0), BLOCK)
    size = tl.where(dropped > 0, tl.log2(tl.maximum(dropped, 1).to(tl.float32)), -60000.0)
    tl.store(tail + row * (padded // BLOCK) + b, size.to(tl.float16), mask=b < padded // BLOCK)


# ---- All above the threshold


@triton.jit
def _lowest(n):
    """A word whose lowest n bits are set."""
    return tl.where(n >= 32, -1, (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1)


@triton.jit
def _ones(x):
    """How many bits are set in words."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["first", "slab", "all_tiles", "room"])
def collect(
    bits, lists, counts, tail, tiles, kv_heads, padded, first, slab, all_tiles, room,
    T: tl.constexpr, SUBS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, WORDS: tl.constexpr,
    RANGES: tl.constexpr,
):  # fmt: skip
    """The list of a tile, in rising order, from its bits and the sinks, as far as there is `room`, and how
    long it is. And of each block log2 of the number of keys that are neither in it nor in the window, which
    the tail needs. The bits are then those of the list, for where there is not enough room."""
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = slab + local
    row = which * tl.num_programs(0) + local
    start = (first // T + tile) * T
    low, end = _candidates(tiles, which // kv_heads * all_tiles + tile, start, WINDOW, RANGES)
    sinks = tl.minimum(SINKS, end)
    words = padded // 32
    bits += row * SUBS * words
    lists += row * room
    tail += row * (padded // BLOCK)
    w, b = tl.arange(0, WORDS), tl.arange(0, WORDS // 2)
    count = 0
    for s in range(0, (start + T + 31) // 32, WORDS):
        key = (s + w) * 32
        some = (key < end) & (key + 32 > low)
        x = tl.load(bits + s + w, mask=some, other=0)
        for part in tl.static_range(1, SUBS):
            x = x | tl.load(bits + part * words + s + w, mask=some, other=0)
        x = (x & _lowest(end - key) & ~_lowest(low - key)) | _lowest(sinks - key)
        tl.store(bits + s + w, x, mask=s + w < words)
        size = _ones(x)
        at = count + tl.cumsum(size, 0) - size
        for i in tl.static_range(32):
            here = (x >> i) & 1
            tl.store(lists + at, key + i, mask=(here > 0) & (at < room))
            at += here
        count += tl.sum(size, 0)
        block = s // 2 + b
        dropped = tl.minimum(tl.maximum(end - block * BLOCK, 0), BLOCK)
        dropped -= tl.sum(tl.reshape(size, [WORDS // 2, 2]), 1)
        size = tl.where(dropped > 0, tl.log2(tl.maximum(dropped, 1).to(tl.float32)), -60000.0)
        tl.store(tail + block, size.to(tl.float16), mask=block < padded // BLOCK)
    tl.store(counts + row, count)


# ---- Attention over the list, the window and the tail


@triton.jit
def _attend(values, peak, total, acc, scores, factor):
    """One step of the softmax over more keys, whose scores are still to be multiplied with `factor`."""
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    weights, fading = tl.exp2(scores * factor - higher[:, None]), tl.exp2(peak - higher)
    total = total * fading + tl.sum(weights, 1)
    return higher, total, tl.dot(weights.to(values.dtype), values, acc * fading[:, None])


@triton.jit
def _attend_at(
    x, k, v, j, inside, begin, k_token, v_token, factor, hidden, peak, total, acc,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, INT64: tl.constexpr,
    RANGES: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One step over the keys j, all before the window: with ALL over all, else those that are `inside`."""
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    if INT64:
        j = j.to(tl.int64)
    y = tl.load(k + j[None, :] * k_token + d[:, None], mask=(d < D)[:, None], other=0)
    scores = tl.dot(x, y)
    if not ALL:
        scores = tl.where(inside[None, :], scores, hidden)
    if RANGES:
        scores = tl.where(j[None, :] >= begin[:, None], scores, hidden)
    values = tl.load(v + j[:, None] * v_token + dv[None, :], mask=(dv < DV)[None, :], other=0)
    return _attend(values, peak, total, acc, scores, factor)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_blocks", "first", "slab", "all_tiles", "room"])
def attend(
    q, k, v, k_mean, v_mean, lists, counts, bits, tail, out, starts, stops, tiles,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    kv_heads, num_queries, num_keys, padded, num_blocks, first, slab, all_tiles, room, scale,
    G: tl.constexpr, T: tl.constexpr, TQ: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WINDOW: tl.constexpr, SUBS: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, INT64: tl.constexpr,
    RANGES: tl.constexpr,
):  # fmt: skip
    """Softmax attention of the columns at TQ positions over what their tile keeps. Of a list that is longer
    than `room` the rest is read from its bits. SUBS: the rows of bits of a tile, 0 where lists always have
    room."""
    PARTS: tl.constexpr = T // TQ
    local, which = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = slab + local // PARTS
    start = first // T * T + slab * T + local * TQ
    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    x, position, exists = _queries(
        q, which, start, q_batch, q_head, q_token, kv_heads, first, num_queries, G, TQ, GP, D, BD
    )
    k += which // kv_heads * k_batch + which % kv_heads * k_head
    v += which // kv_heads * v_batch + which % kv_heads * v_head
    row = which * (tl.num_programs(0) // PARTS) + local // PARTS
    lists += row * room
    count = tl.load(counts + row)
    table = which // kv_heads * all_tiles + tile
    _, window = _candidates(tiles, table, start // T * T, WINDOW, RANGES)
    at = which // kv_heads * num_queries + position - first
    begin, last = _range(starts, stops, at, position, exists, RANGES)
    end = tl.minimum(start + TQ, num_keys)
    if RANGES:
        end = tl.max(last, 0) + 1
    factor = tl.maximum(scale * LOG2E, 1e-20)
    hidden = NOTHING / factor  # times the factor it is far below the first peak, whatever is rounded
    peak = tl.full([TQ * GP], NOTHING / 10, tl.float32)
    total = tl.zeros([TQ * GP], tl.float32)
    acc = tl.zeros([TQ * GP, BDV], tl.float32)
    listed = count
    if SUBS:
        listed = tl.minimum(count, room)
    full = listed // BN * BN
    j = tl.load(lists + n, mask=n < listed, other=0)
    for s in range(0, full, BN):
        after = tl.load(lists + s + BN + n, mask=s + BN + n < listed, other=0)  # early: keys wait for it
        peak, total, acc = _attend_at(
            x, k, v, j, j >= 0, begin, k_token, v_token, factor, hidden, peak, total, acc,
            D, DV, BD, BDV, INT64, RANGES, True,
        )  # fmt: skip
        j = after
    if full < listed:
        peak, total, acc = _attend_at(
            x, k, v, j, full + n < listed, begin, k_token, v_token, factor, hidden, peak, total, acc,
            D, DV, BD, BDV, INT64, RANGES, False,
        )  # fmt: skip
    if SUBS:
        bits += row * SUBS * (padded // 32)
        rest = window
        if count > room:
            rest = tl.load(lists + room - 1) + 1
        for s in range(rest // BN * BN, window, BN):
            j = s + n
            inside = ((tl.load(bits + j // 32) >> (j % 32)) & 1 > 0) & (j >= rest)
            j = tl.where(inside, j, 0)
            peak, total, acc = _attend_at(
                x, k, v, j, inside, begin, k_token, v_token, factor, hidden, peak, total, acc,
                D, DV, BD, BDV, INT64, RANGES, False,
            )  # fmt: skip
    for s in range(window, end, BN):
        key = s + n
        if INT64:
            key = key.to(tl.int64)
        inside = key < num_keys
        y = tl.load(k + key[None, :] * k_token + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0)
        scores = tl.where(_sees(key, begin, last, RANGES), tl.dot(x, y), hidden)
        values = tl.load(
            v + key[:, None] * v_token + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0
        )
        peak, total, acc = _attend(values, peak, total, acc, scores, factor)
    if TAIL:
        tail += row * (padded // BLOCK)
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
                peak, total, acc = _attend(values, peak, total, acc, scores, 1.0)
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
            peak, total, acc = _attend(values, peak, total, acc, scores, 1.0)
    row, head = position - first, tl.arange(0, TQ * GP) // TQ
    at = which // kv_heads * o_batch + (which % kv_heads * G + head) * o_head + row.to(tl.int64) * o_token
    result = acc / total[:, None]
    if RANGES:
        result = tl.where((last >= 0)[:, None], result, 0.0)
    result = result.to(out.dtype.element_ty)
    tl.store(out + at[:, None] + dv[None, :], result, mask=exists[:, None] & (dv < DV)[None, :])
