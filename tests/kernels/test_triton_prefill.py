"""The GPU kernel for prompts, against the reference in float64: on the card where there is one, elsewhere in
Triton's interpreter, which runs one program after the other and so wants small shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsek import SparseKConfig, attention
from sparsek.kernels import reference, triton_prefill
from sparsek.problem import Problem, make_problem
from sparsek.verify import VerificationError, verify

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()

DEVICE = "cuda" if ON_CARD else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
ERROR = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of the whole output, relative: about 2x PyTorch's own
TILES = SparseKConfig(select="tile", top_k=16, min_context=0, dense_layers=())
SHARES = replace(TILES, top_k="auto", min_share=0.02)


def problem(
    config: SparseKConfig = TILES,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    queries: int = 130,
    keys: int = 130,
    sizes: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float16,
    factor: float = 1.5,
    **changed: Any,
) -> Problem:
    """Causal; keys have a common part, as in models, and half of the dimensions most of the energy."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(batch, heads[0], queries, sizes[0]) * factor
    k = normal(batch, heads[1], keys, sizes[0]) + 2 * normal(batch, heads[1], 1, sizes[0])
    v = normal(batch, heads[1], keys, sizes[1])
    weak = torch.arange(sizes[0]) % 2 == 1
    if sizes[0] > 64:
        q, k = q * torch.where(weak, 0.5, 1), k * torch.where(weak, 0.5, 1)
    q, k, v = (x.to(dtype).to(DEVICE) for x in (q, k, v))
    return replace(make_problem(q, k, v, config=config, is_causal=True), **changed)


def grid(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the rows, [Tq, 1], and of the keys, [Tk]."""
    return torch.arange(keys - queries, keys)[:, None], torch.arange(keys)


def masked(seen: torch.Tensor, config: SparseKConfig = TILES, **shape: Any) -> Problem:
    """Not causal but by its mask, which broadcasts to [B, H, Tq, Tk]."""
    p = problem(config, **shape)
    return make_problem(p.q, p.k, p.v, config=config, attn_mask=seen.to(DEVICE))


def in_float64(p: Problem) -> Problem:
    assert p.v is not None
    return replace(p, q=p.q.double(), k=p.k.double(), v=p.v.double())


def poisoned(p: Problem) -> triton_prefill._Call:
    """A call whose memory holds NaN and impossible numbers before the passes write to it."""
    assert triton_prefill.why_not(p) is None
    call = triton_prefill._Call(p)
    for name, x in vars(call).items():
        if isinstance(x, torch.Tensor) and name not in ("q", "k", "v", "of_tiles", "of_all"):
            x.view(torch.uint8).fill_(0xFF)
    return call


def with_rule(p: Problem, **fields: Any) -> Problem:
    return replace(p, rule=replace(p.rule, **fields))


def of_tiles(p: Problem, kept: torch.Tensor) -> list[list[int]]:
    """How many keys any row of a tile keeps, of each tile and each key head."""
    tile = (torch.arange(p.num_queries) + p.first_position) // p.rule.tile
    kept = kept.unflatten(1, (p.k.shape[1], -1)).any(2)
    return [kept[:, :, tile == t].any(2).sum(-1).flatten().tolist() for t in tile.unique()]


def assert_right(p: Problem, *, same: float = 0.6, same_counts: bool = True) -> torch.Tensor:
    """The output is attention over the kept keys, and at least a share of the lists is that of the
    definition: choosing is in 8 bits. `same_counts`: the rows of a tile see the same of its list."""
    call = poisoned(p)
    out, selection = call.run(), call.selection()
    exact = in_float64(p)
    expected = reference.attention(exact, selection)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= ERROR[p.q.dtype]
    wanted = reference.select(exact)
    kept, own = selection.to_mask(), wanted.to_mask()
    none = reference.select(with_rule(exact, top_k=0, min_share=0.0)).to_mask()
    verify(p, out, backend="triton_prefill")
    if p.rule.min_share:
        assert (kept & none).sum() == none.sum()
        assert_shares(exact, kept & ~none, none)
        return out
    assert of_tiles(p, kept) == of_tiles(p, own)
    assert torch.equal(selection.counts, wanted.counts) or not same_counts
    listed = own & ~none
    assert (kept & listed).sum() >= same * listed.sum()
    return out


def assert_shares(p: Problem, kept: torch.Tensor, always: torch.Tensor) -> None:
    """Kept is what some row of the tile gives `min_share`, within a factor of three, which 8 bits and the
    estimate of the sum can make of it."""
    share = torch.full_like(kept, -torch.inf, dtype=torch.float64)
    seen = torch.zeros_like(kept)
    for chunk in reference.chunks(p):
        n = chunk.scores.shape[-1]
        allowed = torch.broadcast_to(chunk.allowed, chunk.scores.shape)
        share[:, :, chunk.rows, :n] = reference.log_share(chunk.scores, allowed).flatten(1, 2)
        seen[:, :, chunk.rows, :n] = allowed.flatten(1, 2)
    tile = (torch.arange(p.num_queries) + p.first_position) // p.rule.tile
    groups = p.k.shape[1], -1
    for t in tile.unique():
        best = share[:, :, tile == t].unflatten(1, groups).amax((2, 3)).exp()[:, :, None, None]
        of_tile, rest = (x[:, :, tile == t].unflatten(1, groups) for x in (kept, seen & ~always))
        assert not (of_tile & (best < p.rule.min_share / 3)).any()
        assert (of_tile | ~rest | (best < 3 * p.rule.min_share)).all()
        assert torch.equal(of_tile, rest & of_tile.any(3, keepdim=True).any(2, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TILES, {}),
        (replace(TILES, top_k=24, tile=32), {"heads": (3, 1), "queries": 70, "keys": 200, "sizes": (64, 48)}),
        (
            replace(TILES, top_k=8, sinks=0, window=0, tail="none"),
            {"batch": 2, "heads": (2, 2), "queries": 33, "keys": 333, "sizes": (80, 16)},
        ),
        (
            replace(TILES, sinks=9, window=40),
            {"heads": (16, 1), "queries": 40, "keys": 300},
        ),
        (TILES, {"heads": (1, 1), "queries": 1, "keys": 150, "sizes": (128, 128)}),
        (TILES, {"heads": (1, 1), "queries": 64, "keys": 200, "sizes": (256, 256)}),
        (TILES, {"heads": (4, 2), "queries": 100, "keys": 170, "sizes": (96, 96)}),
        (SHARES, {}),
        (replace(SHARES, tile=32), {"heads": (3, 1), "queries": 70, "keys": 200, "sizes": (64, 48)}),
        (
            replace(SHARES, sinks=0, window=0, tail="none"),
            {"batch": 2, "heads": (2, 2), "queries": 33, "keys": 333, "sizes": (80, 16)},
        ),
        (replace(SHARES, sinks=40, window=40), {"heads": (16, 1), "queries": 40, "keys": 300}),
        (SHARES, {"heads": (1, 1), "queries": 1, "keys": 150, "sizes": (128, 128)}),
        (SHARES, {"heads": (4, 1), "queries": 200, "keys": 500, "sizes": (256, 256), "factor": 0.3}),
        (replace(SHARES, min_share=1e-9), {"heads": (1, 1), "queries": 64, "keys": 200, "sizes": (256, 256)}),
    ],
    ids=[
        *("plain", "gqa of 3", "no tail", "gqa of 16", "one row", "large heads", "heads of 96"),
        *(
            "share",
            "share, gqa of 3",
            "share, no tail",
            "share, gqa of 16",
            "share, one row",
            "share, large heads",
            "share, all",
        ),
    ],
)
def test_agrees_with_the_reference(config: SparseKConfig, shape: dict[str, Any], dtype: torch.dtype) -> None:
    assert_right(problem(config, dtype=dtype, **shape))


LENGTHS = torch.tensor([270, 80])[:, None, None, None]  # of the two entries of a batch
SHORT, WHOLE, END = grid(130, 130), grid(270, 270), grid(70, 333)


def padded_left(position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= position) & (key >= len(key) - LENGTHS)


def padded_right(position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= position) & (key < LENGTHS)


def packed(position: torch.Tensor, key: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
    sequence = [torch.searchsorted(torch.tensor(starts), x, right=True) for x in (position, key)]
    return (key <= position) & (sequence[0] == sequence[1])


def sliding(position: torch.Tensor, key: torch.Tensor, size: int) -> torch.Tensor:
    return (key <= position) & (key > position - size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seen", "config", "shape"),
    [
        (padded_left(*WHOLE), TILES, {"batch": 2, "heads": (4, 2)}),
        (padded_right(*WHOLE), replace(TILES, tile=32), {"batch": 2, "heads": (3, 1)}),
        (padded_right(*END), replace(TILES, tail="none", sinks=0, window=0), {"batch": 2}),
        (packed(*WHOLE, (40, 192, 250)), replace(TILES, window=70), {"heads": (4, 1)}),
        (packed(*END, (300,)), TILES, {"heads": (16, 1)}),
        (SHORT[1] <= SHORT[0].where(SHORT[0] % 70 > 65, -1), TILES, {}),
        ((SHORT[1] < 100).expand(1, 130)[:, None], TILES, {}),
        (padded_left(*WHOLE), SHARES, {"batch": 2, "heads": (4, 2)}),
        (padded_right(*WHOLE), replace(SHARES, tile=32), {"batch": 2, "heads": (3, 1)}),
        (packed(*WHOLE, (40, 192, 250)), replace(SHARES, window=70), {"heads": (4, 1)}),
        (packed(*END, (300,)), SHARES, {"heads": (16, 1)}),
        (SHORT[1] <= SHORT[0].where(SHORT[0] % 70 > 65, -1), SHARES, {}),
    ],
    ids=[
        *("left", "right", "right, not all queries", "packed", "packed, gqa of 16", "empty rows", "one row"),
        *("share, left", "share, right", "share, packed", "share, packed, gqa of 16", "share, empty rows"),
    ],
)
def test_masks(seen: torch.Tensor, config: SparseKConfig, shape: dict[str, Any], dtype: torch.dtype) -> None:
    queries, keys = seen.shape[-2:]
    p = masked(seen, config, queries=queries, keys=keys, dtype=dtype, **shape)
    out = assert_right(p)
    assert p.mask is not None
    assert not out[~p.mask.any(-1).expand(out.shape[:3])].any()


@pytest.mark.parametrize(
    ("seen", "shape"),
    [
        (sliding(*SHORT, 50), {}),
        (sliding(*WHOLE, 190), {"heads": (2, 2)}),
        (sliding(*END, 100), {"heads": (16, 1)}),
        ((WHOLE[1] <= WHOLE[0]) & (WHOLE[1] < WHOLE[0] * 37 % 331) & (WHOLE[1] > WHOLE[0] * 13 % 200), {}),
    ],
    ids=["all within", "long", "gqa of 16", "any ranges"],
)
def test_masks_that_show_the_rows_of_a_tile_different_keys(seen: torch.Tensor, shape: dict[str, Any]) -> None:
    queries, keys = seen.shape[-2:]
    config = replace(TILES, top_k=6)
    assert_right(masked(seen, config, queries=queries, keys=keys, **shape), same_counts=False)


def test_a_mask_that_is_the_causal_rule_changes_nothing() -> None:
    p = problem(keys=270, queries=270)
    same = masked(WHOLE[1] <= WHOLE[0], keys=270, queries=270)
    assert torch.equal(poisoned(same).selection().indices, poisoned(p).selection().indices)
    assert torch.allclose(triton_prefill.attention(same), triton_prefill.attention(p), atol=2e-3)


def test_masks_of_numbers_and_with_the_causal_rule_are_the_same_masks() -> None:
    p = masked(padded_left(*WHOLE), batch=2, keys=270, queries=270)
    want = triton_prefill.attention(p)
    assert p.mask is not None
    numbers = torch.zeros(p.mask.shape, device=DEVICE).masked_fill(~p.mask, -torch.inf)
    assert torch.equal(triton_prefill.attention(replace(p, mask=numbers)), want)
    padding = (WHOLE[1] >= 270 - LENGTHS).expand(p.mask.shape).to(DEVICE)
    assert torch.equal(triton_prefill.attention(replace(p, mask=padding, is_causal=True)), want)


def test_rows_that_see_nothing_at_all_are_zero() -> None:
    assert not triton_prefill.attention(masked(torch.zeros(1, 130, dtype=torch.bool))).any()


def test_keys_that_are_masked_out_do_not_matter_for_the_choice() -> None:
    """A cache of zeros, filled to a quarter: the keys that centre the others are of the filled part."""
    p = masked(torch.arange(1300) < 333 - 33 + torch.arange(33)[:, None], queries=33, keys=1300)
    p.k[..., 0] += 100
    p.k[:, :, 333:] = 0
    assert_right(p, same=0.8)


def test_masks_with_groups_and_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TILES, top_k=4, sinks=0, window=1)
    p = masked(packed(*WHOLE, (77, 200)), config, queries=270, keys=270)
    want = poisoned(p).selection()
    monkeypatch.setattr(triton_prefill, "_ALL_AT_ONCE", 0)
    monkeypatch.setattr(triton_prefill, "_SLAB_OF_COUNTS", 1)
    assert (poisoned(p).grouped, poisoned(p).slab) == (True, 1)
    assert torch.equal(poisoned(p).selection().indices, want.indices)


def test_verification_takes_masks() -> None:
    p = masked(packed(*WHOLE, (77, 200)), queries=270, keys=270)
    verify(p, triton_prefill.attention(p), backend="triton_prefill", rows=8)


def test_before_8_bits_keys_are_chosen_in_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs of compute capability 8.0."""
    monkeypatch.setattr(triton_prefill, "_low_dtype", lambda _: torch.float16)
    p = problem(heads=(4, 2), queries=100, keys=300, sizes=(64, 64), dtype=DTYPES[-1])
    assert poisoned(p).low.dtype == torch.float16
    assert_right(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "size"), [(3, 64), (2, 12), (7, 128), (3, 96)])
def test_channels_and_heads_that_do_not_exist_are_zero(group: int, size: int, dtype: torch.dtype) -> None:
    call = poisoned(problem(heads=(group, 1), queries=70, keys=70, sizes=(size, size), dtype=dtype))
    next(call.choose())
    of_heads = call.low_q.float().unflatten(2, (-1, call.group_slots, call.positions)).flatten(1, 2)
    picked = min(size, call.low.shape[-1] - 3)
    assert not of_heads[:, :, group:, :, :-3].any()
    assert (of_heads[:, :, group:, :, -3] < -200).all()  # a threshold that no key is above
    for x in (of_heads, call.low.float(), call.low_mean.float()):
        assert not x[..., picked:-3].any()
        assert x[..., :picked].any()
    assert (call.low.float()[..., -3:] == torch.tensor([128, 8, 0.5], device=DEVICE)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "size", "keys"),
    [(4, 64, 700), (4, 128, 700), (4, 256, 700), (1, 256, 300), (16, 128, 300), (3, 40, 300), (2, 96, 1000)],
)
def test_every_number_that_scoring_reads_and_every_bit_it_writes(
    group: int, size: int, keys: int, dtype: torch.dtype
) -> None:
    """Beside PyTorch, number by number: a wrong threshold shows in no output but as a longer list. (The
    interpreter rounds ties up, and some numbers below a power of two to half of that.)"""
    p = problem(SHARES, heads=(group, 1), queries=200, keys=keys, sizes=(size, 16), dtype=dtype, factor=0.5)
    call = poisoned(p)
    next(call.choose())
    picked = min(size, call.low.shape[-1] - 3)
    dims, centre = call.picked[0, :picked].long(), call.centre[0, :picked]
    key_unit, query_unit, seen = call.units[0]

    def low(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-14, 14).to(torch.float8_e4m3fn).float()

    def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
        close = torch.isclose(found, expected, rtol=0.13, atol=2e-3)  # the next number of 8 bits
        assert close.double().mean() >= (1 if ON_CARD else 0.85), (found[~close], expected[~close])
        assert (found == expected).double().mean() >= 0.85

    k = p.k[0, 0].float()[:, dims]
    assert_same(call.low[0, :keys, :picked].float(), low((k - centre) * key_unit))
    means = k[: keys // 64 * 64].unflatten(0, (-1, 64)).mean(1)
    of_means = call.low_mean[0, : len(means), :picked].float()
    assert_same(of_means, low((means - centre) * key_unit))

    rows = call.low_q[0].float().unflatten(1, (-1, call.group_slots, call.positions))[:, :, :group]
    rows = rows.permute(2, 0, 1, 3, 4).flatten(1, 3)  # [heads, positions of the tiles, slots]
    before = call.first % p.rule.tile
    rows = rows[:, before : before + p.num_queries]
    assert_same(rows[..., :picked], low(p.q[0].float()[..., dims] * query_unit))

    factor = p.scale * math.log2(math.e) / (key_unit * query_unit)
    scores, of_blocks = (
        (rows[..., :picked] @ x.T) * factor for x in (call.low[0, :keys, :picked].float(), of_means)
    )
    position = torch.arange(p.num_queries, device=DEVICE)[:, None] + call.first
    key = torch.arange(keys, device=DEVICE)
    start = position // call.positions * call.positions  # of the row's program
    block = ((start - 63) // 64).clamp(min=1)
    by_key = (key <= position) & ((key < 64) | (key >= 64 * block))
    by_mean = (key[: len(means)] >= 1) & (key[: len(means)] < block)
    terms = [scores.masked_fill(~by_key, -torch.inf), (of_blocks + 6).masked_fill(~by_mean, -torch.inf)]
    least = torch.cat(terms, 2).mul(math.log(2)).logsumexp(2) / math.log(2) + math.log2(p.rule.min_share)
    least = torch.where(least > 0, least * seen, least)
    threshold = -(rows[..., -3:] * torch.tensor([128, 8, 0.5], device=DEVICE)).sum(-1) * factor
    chooses = (position >= p.rule.tile)[:, 0]  # others have nothing before their window
    torch.testing.assert_close(threshold[:, chooses], least[:, chooses], rtol=0, atol=0.03)

    above = scores - threshold[..., None]
    assert call.bits is not None
    for t in range(call.tiles):
        of_tile = (position // p.rule.tile == call.first // p.rule.tile + t)[:, 0]
        window = max(0, (call.first // p.rule.tile + t) * p.rule.tile - p.rule.window + 1)
        best = above[:, of_tile, 4:window].amax((0, 1)) if window > 4 else above.new_empty(0)
        words = call.bits[0, t, 0, : -(-keys // 32)]
        bits = ((words[:, None] >> torch.arange(32, device=DEVICE)) & 1).flatten()[4:][: len(best)] > 0
        clear = best.abs() > 0.05  # of the others rounding decides
        assert clear.sum() >= 0.5 * len(best)
        assert torch.equal(bits[clear], best[clear] > 0)


@pytest.mark.skipif(not ON_CARD, reason="needs 9 GB of a GPU's memory")
def test_more_than_2_to_the_31_elements() -> None:
    """A cache in which tokens are so far apart that 32 bits do not reach the last one."""
    near = problem(queries=100, keys=8200, sizes=(64, 64))
    assert near.v is not None
    far = torch.empty(2, 1, 8200, 1, 2**18, dtype=near.q.dtype, device=DEVICE)
    k, v = (x.transpose(1, 2)[..., :64] for x in far)
    k.copy_(near.k), v.copy_(near.v)
    assert k.stride(2) * 8199 > 2**31
    assert torch.equal(triton_prefill.attention(replace(near, k=k, v=v)), triton_prefill.attention(near))


@pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
def test_an_old_gpu_is_told_from_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert triton_prefill.why_not(problem()) == "the GPU has compute capability 7.5, 8.0 is needed"


def test_some_rows_of_a_call_are_those_of_the_call() -> None:
    p = problem(replace(TILES, tile=32), queries=150, keys=200)
    whole = triton_prefill.attention(p)
    rows = slice(32 * 3 - 50, 32 * 4 - 50)  # a tile
    assert torch.equal(triton_prefill.attention(p.rows(rows)), whole[:, :, rows])
    p.q[:, :, rows] /= 256  # units are those of all queries, or these would be finer alone
    kept = triton_prefill.select(p).to_mask()
    assert torch.equal(triton_prefill.select(p.rows(rows)).to_mask(), kept[:, :, rows])
    p = masked(packed(*grid(150, 200), (70,)), queries=150, keys=200)
    whole, rows = triton_prefill.attention(p), slice(14, 78)
    assert torch.equal(triton_prefill.attention(p.rows(rows)), whole[:, :, rows])


def test_verification_takes_it_and_notices_what_is_wrong() -> None:
    p = problem(queries=100, keys=300)
    out = triton_prefill.attention(p)
    assert verify(p, out, backend="triton_prefill").rows >= 64
    out[0, 0, -1] += 1
    with pytest.raises(VerificationError, match="output is off"):
        verify(p, out, backend="triton_prefill")


def test_the_best_groups_hold_the_best_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(replace(TILES, top_k=4), keys=400, queries=70)
    want = poisoned(p).selection()
    monkeypatch.setattr(triton_prefill, "_ALL_AT_ONCE", 0)
    assert poisoned(p).grouped
    assert torch.equal(poisoned(p).selection().indices, want.indices)


def test_packed_sequences_by_where_they_start() -> None:
    """No mask of queries x keys is made, and nothing else changes."""
    p = problem(batch=2, queries=200, keys=200)
    starts = torch.zeros(2, 200, dtype=torch.int32, device=DEVICE)
    starts[0, 70:], starts[1, 130:] = 70, 130
    packed = replace(p, starts=starts)
    out = assert_right(packed)
    masked = packed.with_mask()
    assert masked.mask is not None
    assert torch.equal(out, triton_prefill.attention(masked))
    assert torch.equal(reference.attention(packed), reference.attention(masked))
    rows = slice(64, 128)
    assert torch.equal(triton_prefill.attention(packed.rows(rows)), out[:, :, rows])


def test_another_rule_does_not_look_at_the_mask_again() -> None:
    p = problem(mask=torch.ones(1, 1, 130, 130, dtype=torch.bool, device=DEVICE).tril())
    assert p.ranges is not None
    assert p.with_rule(replace(p.rule, top_k=5)).ranges is p.ranges


def test_groups_of_sinks_take_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(replace(TILES, top_k=4, sinks=64), keys=400, queries=70)
    p.k[:, :, :64] *= 3
    monkeypatch.setattr(triton_prefill, "_ALL_AT_ONCE", 0)
    assert torch.equal(triton_prefill.select(p).counts, reference.select(in_float64(p)).counts)


@pytest.mark.parametrize("config", [TILES, SHARES], ids=["count", "share"])
def test_slabs_change_nothing(config: SparseKConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(replace(config, tile=32))
    want = triton_prefill.attention(p)
    for least in ("_SLAB_BYTES", "_SLAB_OF_COUNTS"):
        monkeypatch.setattr(triton_prefill, least, 1)
    call = poisoned(p)
    assert call.slab == 1
    assert torch.equal(call.run(), want)


def test_a_list_that_has_no_room_is_read_from_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(replace(SHARES, min_share=1e-4), heads=(4, 2), queries=200, keys=300)
    want = poisoned(p).selection()
    monkeypatch.setattr(triton_prefill, "_LEAST_ROOM", 16)
    call = poisoned(p)
    assert call.room < want.counts.max()
    assert torch.equal(call.selection().indices, want.indices)
    assert_right(p)


def test_heads_whose_dimensions_are_all_alike_keep_as_many() -> None:
    """A rotation of queries and keys changes no score, but half of the dimensions then show half of each."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, 128, generator=generator), torch.randn(1, 2000, 128, generator=generator)
    size = torch.linspace(1.2, 0.1, 128)
    turned = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    config = replace(TILES, top_k="auto", min_share=0.004)
    counts = []
    for rotation in (torch.eye(128), turned):
        rows = [(x * size @ rotation)[None].half().to(DEVICE) for x in (q, k)]
        p = make_problem(rows[0], rows[1], rows[1], config=config, is_causal=True)
        counts.append(int(triton_prefill.select(p).counts.sum()))
        verify(p, triton_prefill.attention(p), backend="triton_prefill")
    assert 2 * 64 * 200 < counts[0] < 2 * 64 * 1000
    assert 0.8 < counts[1] / counts[0] < 1.3


def test_a_count_limits_a_share() -> None:
    few = problem(replace(SHARES, min_share=1e-4, top_k=8))
    counted = with_rule(few, min_share=0.0)
    assert_right(counted)
    assert torch.equal(triton_prefill.select(few).to_mask(), triton_prefill.select(counted).to_mask())
    many, alone = problem(replace(SHARES, top_k=100)), problem(SHARES)
    assert torch.equal(triton_prefill.select(many).counts, triton_prefill.select(alone).counts)
    always = reference.select(with_rule(alone, top_k=0, min_share=0.0)).to_mask()
    every = triton_prefill.select(alone).to_mask() & ~always
    limit = max(max(lengths) for lengths in of_tiles(alone, every)) // 2
    some = triton_prefill.select(problem(replace(SHARES, top_k=limit))).to_mask() & ~always
    assert not (some & ~every).any()
    wanted = [[min(limit, length) for length in lengths] for lengths in of_tiles(alone, every)]
    assert of_tiles(alone, some) == wanted
    assert wanted != of_tiles(alone, every)


def test_the_same_twice() -> None:
    p = problem()
    assert torch.equal(triton_prefill.attention(p), triton_prefill.attention(p))


def test_strides_change_nothing() -> None:
    p = problem(batch=2, heads=(4, 2), queries=70, keys=70)
    want = triton_prefill.attention(p)
    assert p.v is not None
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v))
    assert torch.equal(triton_prefill.attention(replace(p, q=q, k=k, v=v)), want)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (p.q, p.k, p.v))
    assert torch.equal(triton_prefill.attention(replace(p, q=q, k=k, v=v)), want)


def test_chunks_of_whole_tiles_change_nothing_much() -> None:
    """The rows of a tile decide together, so a prompt can be given in chunks that end where tiles do."""
    p = problem(queries=192, keys=192)
    whole = triton_prefill.select(p)
    assert p.v is not None
    for start in range(0, 192, 64):
        stop = start + 64
        part = make_problem(
            p.q[:, :, start:stop], p.k[:, :, :stop], p.v[:, :, :stop], config=TILES, is_causal=True
        )
        kept = triton_prefill.select(part).to_mask()
        own = whole.to_mask()[:, :, start:stop, :stop]
        assert (kept & own).sum() >= 0.9 * own.sum()


@pytest.mark.parametrize("factor", [1e-6, 30.0])
def test_tiny_and_huge_scores(factor: float) -> None:
    assert_right(problem(factor=factor), same=0.2)


def test_equal_scores_go_to_the_lower_position() -> None:
    p = problem(replace(TILES, top_k=8, sinks=2))
    p = replace(p, k=torch.ones_like(p.k))
    row = triton_prefill.select(p).indices[0, 0, -1].tolist()
    assert row[:10] == list(range(10))


def test_values_that_are_all_the_same_stay() -> None:
    p = problem(batch=2, queries=100, keys=300)
    p = replace(p, v=torch.full_like(p.k, 3.0))
    assert torch.allclose(triton_prefill.attention(p), torch.tensor(3.0, dtype=p.q.dtype), atol=4e-3)


def test_nan_in_a_key_stays_with_those_that_see_it() -> None:
    p = problem(queries=200, keys=200)
    want = triton_prefill.attention(p)
    p.k[:, :, 150] = torch.nan
    assert torch.isfinite(triton_prefill.attention(p)[:, :, :128]).all()
    assert torch.isfinite(want).all()


def test_nan_stays_in_its_rows() -> None:
    p = problem()
    p.q[0, 0, 100] = torch.nan
    out = triton_prefill.attention(p)
    assert out[0, :, :64].isfinite().all()


RANGE = "the mask is not one range of keys for each row"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rule": replace(problem().rule, tile=0)}, "each query chooses its own keys"),
        ({"rule": replace(problem().rule, top_k=130)}, "the rule keeps everything"),
        ({"rule": replace(problem().rule, stride=3)}, "stride is given"),
        ({"is_causal": False}, "attention is not causal"),
        ({"softcap": 30.0}, "softcap is given"),
        ({"mask": ~torch.eye(130, dtype=torch.bool)[None, None]}, RANGE),
        ({"mask": torch.ones(1, 1, 130, 130, dtype=torch.bool), "is_causal": False}, RANGE),
        ({"mask": torch.full((1, 1, 130, 130), -1.0)}, RANGE),
        ({"mask": torch.zeros(1, 1, 130, 130).requires_grad_()}, "a gradient is wanted"),
    ],
)
def test_what_it_does_not_take(changed: dict[str, Any], reason: str) -> None:
    assert triton_prefill.why_not(problem(**changed)) == reason


def test_other_dtypes_and_sizes_are_not_taken() -> None:
    assert triton_prefill.why_not(problem(dtype=torch.float32)) == "the dtype is float32"
    big = problem(sizes=(288, 32), queries=2)
    assert triton_prefill.why_not(big) == "the head size is more than 256"
    assert triton_prefill.why_not(problem(heads=(17, 1))) == "a key head has more than 16 heads"


@pytest.mark.skipif(ON_CARD, reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    p = problem()
    assert triton_prefill.why_not(p) == "the inputs are on cpu"
    with pytest.raises(ValueError, match="cannot do this call: the inputs are on cpu"):
        attention(p.q, p.k, p.v, config=TILES, is_causal=True, backend="triton_prefill")
