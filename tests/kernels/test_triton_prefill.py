"""The GPU kernel for prompts, against the reference in float64: on the card where there is one, elsewhere in
Triton's interpreter, which runs one program after the other and so wants small shapes."""

from __future__ import annotations

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
# The interpreter multiplies the bits of bfloat16 numbers instead of the numbers.
DTYPES = [torch.float16, torch.bfloat16] if ON_CARD else [torch.float16]
ERROR = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of the whole output, relative: about 2x PyTorch's own
TILES = SparseKConfig(select="tile", top_k=16, min_context=0, dense_layers=())


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
    """Causal; keys have a common part, as those of models do."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(batch, heads[0], queries, sizes[0]) * factor
    k = normal(batch, heads[1], keys, sizes[0]) + 2 * normal(batch, heads[1], 1, sizes[0])
    v = normal(batch, heads[1], keys, sizes[1])
    q, k, v = (x.to(dtype).to(DEVICE) for x in (q, k, v))
    return replace(make_problem(q, k, v, config=config, is_causal=True), **changed)


def in_float64(p: Problem) -> Problem:
    assert p.v is not None
    return replace(p, q=p.q.double(), k=p.k.double(), v=p.v.double())


def poisoned(p: Problem) -> triton_prefill._Call:
    """A call whose memory holds NaN and impossible numbers before the passes write to it."""
    assert triton_prefill.why_not(p) is None
    call = triton_prefill._Call(p)
    for name, x in vars(call).items():
        if isinstance(x, torch.Tensor) and name not in ("q", "k", "v"):
            x.view(torch.uint8).fill_(0xFF)
    return call


def assert_right(p: Problem, *, same: float = 0.85) -> torch.Tensor:
    """The output is attention over the kept keys, and at least a share of these is what the definition
    keeps: choosing is in 8 bits."""
    call = poisoned(p)
    out, selection = call.run(), call.selection()
    exact = in_float64(p)
    expected = reference.attention(exact, selection)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= ERROR[p.q.dtype]
    wanted = reference.select(exact)
    assert torch.equal(selection.counts, wanted.counts)
    kept, own = selection.to_mask(), wanted.to_mask()
    assert (kept & own).sum() >= same * own.sum()
    return out


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
    ],
    ids=["plain", "gqa of 3", "no tail", "gqa of 16", "one row", "large heads"],
)
def test_agrees_with_the_reference(config: SparseKConfig, shape: dict[str, Any], dtype: torch.dtype) -> None:
    assert_right(problem(config, dtype=dtype, **shape))


def test_some_rows_of_a_call_are_those_of_the_call() -> None:
    p = problem(replace(TILES, tile=32), queries=150, keys=200)
    whole = triton_prefill.attention(p)
    rows = slice(32 * 3 - 50, 32 * 4 - 50)  # a tile
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
    assert poisoned(p)._grouped(0, 2)
    assert torch.equal(poisoned(p).selection().indices, want.indices)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(replace(TILES, tile=32))
    want = triton_prefill.attention(p)
    monkeypatch.setattr(triton_prefill, "_SLAB_BYTES", 1)
    call = poisoned(p)
    assert call.slab == 1
    assert torch.equal(call.run(), want)


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
    assert_right(problem(factor=factor), same=0.5)


def test_equal_scores_go_to_the_lower_position() -> None:
    p = problem(replace(TILES, top_k=8, sinks=2))
    p = replace(p, k=torch.ones_like(p.k))
    row = triton_prefill.select(p).indices[0, 0, -1].tolist()
    assert row[:10] == list(range(10))


def test_values_that_are_all_the_same_stay() -> None:
    p = problem(batch=2, queries=100, keys=300)
    p = replace(p, v=torch.full_like(p.k, 3.0))
    assert torch.allclose(triton_prefill.attention(p), torch.tensor(3.0, dtype=p.q.dtype), atol=4e-3)


def test_nan_stays_in_its_rows() -> None:
    p = problem()
    p.q[0, 0, 100] = torch.nan
    out = triton_prefill.attention(p)
    assert out[0, :, :64].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rule": replace(problem().rule, tile=0)}, "each query chooses its own keys"),
        ({"rule": replace(problem().rule, top_k=130)}, "the rule keeps everything"),
        ({"rule": replace(problem().rule, stride=3)}, "stride is given"),
        ({"is_causal": False}, "attention is not causal"),
        ({"softcap": 30.0}, "softcap is given"),
        ({"mask": torch.ones(1, 1, 130, 130, dtype=torch.bool)}, "there is a mask"),
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
