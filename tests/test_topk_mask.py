"""topk_mask(): the kept set as an additive mask, and that any attention under it is the plain method."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn.functional import scaled_dot_product_attention

from sparsek import SparseKConfig, attention, select, topk_mask

from . import oracle
from .strategies import Case, cases, examples

TOKENS = 100
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def padded() -> torch.Tensor:
    """Left padding of 0 and 30 tokens; the rows of the padding itself see nothing."""
    is_token = torch.arange(TOKENS) >= torch.tensor([[0], [30]])
    return is_token[:, None, None, :] & CAUSAL


def packed() -> torch.Tensor:
    """Sequences of 20, 50 and 30 tokens in one row."""
    sequence = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([20, 50, 30]))
    return (sequence[:, None] == sequence) & CAUSAL


def sliding_window() -> torch.Tensor:
    return CAUSAL & ~CAUSAL.tril(-24)


def additive() -> torch.Tensor:
    """A bias that grows with distance and differs by head, as in ALiBi."""
    slope = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    key = torch.arange(TOKENS)
    return (slope * (key - key[:, None])).masked_fill(~CAUSAL, -torch.inf)[None].double()


BASE_MASKS = {
    "causal": lambda: CAUSAL,
    "padded": padded,
    "packed": packed,
    "sliding window": sliding_window,
    "additive": additive,
}


def heads(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of two sequences, four query heads on two key/value heads."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, TOKENS, 16, generator=rng, dtype=torch.float64) for h in (4, 2, 2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("top_k", [1, 7, TOKENS])
@pytest.mark.parametrize("name", BASE_MASKS)
def test_pure_attention_equals_sdpa_under_the_mask(name: str, top_k: int) -> None:
    q, k, v = heads(1)
    base, config = BASE_MASKS[name](), SparseKConfig.pure(top_k)
    mask = topk_mask(q, k, config=config, attn_mask=base)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    empty = (mask == -torch.inf).all(-1, keepdim=True)
    got = attention(q, k, v, config=config, attn_mask=base)
    torch.testing.assert_close(got, plain.masked_fill(empty, 0), rtol=1e-12, atol=1e-12)
    allowed = base if base.dtype == torch.bool else base > -torch.inf
    assert ((mask > -torch.inf).sum(-1) == allowed.sum(-1).clamp(max=top_k)).all()


def test_is_causal_is_the_causal_mask() -> None:
    q, k, _ = heads(2)
    config = SparseKConfig.pure(5)
    mask = topk_mask(q, k, config=config, is_causal=True)
    assert torch.equal(mask, topk_mask(q, k, config=config, attn_mask=CAUSAL))
    last_rows = topk_mask(q[:, :, -10:], k, config=config, is_causal=True)
    assert torch.equal(last_rows, mask[:, :, -10:])


@examples(150)
@given(cases(softcap=None))
def test_mask_is_the_kept_set_with_the_values_of_the_base_mask(case: Case) -> None:
    call = case.build()
    options = {name: value for name, value in call.options.items() if name != "softcap"}
    mask = topk_mask(call.q, call.k, **options)
    assert mask.dtype == call.q.dtype
    assert tuple(mask.shape) == (*call.q.shape[:3], case.num_keys)
    mask = oracle.to_float64(mask)
    kept = mask > -np.inf
    oracle.assert_kept(call, kept)
    assert np.array_equal(kept, np.asarray(select(call.q, call.k, **options).to_mask()))
    added = 0 if case.mask != "additive" else np.broadcast_to(oracle.to_float64(call.attn_mask), mask.shape)
    assert (mask == np.where(kept, added, -np.inf)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_finite_mask_values_forbid_nothing(dtype: torch.dtype, low: float) -> None:
    """Only -inf forbids, even where a value does not fit the dtype of q. Models have such masks."""
    q, k, v = heads(3, dtype)
    base = torch.full((TOKENS, TOKENS), low)
    base[1:].triu_(2)
    for config, backend in product(
        (SparseKConfig.pure(7), SparseKConfig.pure(TOKENS)), ("auto", "reference")
    ):
        out = attention(q, k, v, config=config, attn_mask=base, backend=backend)
        assert out[:, :, 0].any(-1).all(), (config.top_k, backend)  # not zero, as for a row that sees nothing
    mask = topk_mask(q, k, config=SparseKConfig.pure(7), attn_mask=base)
    assert ((mask > -torch.inf).sum(-1) == 7).all()


def test_a_row_that_sees_nothing_is_all_minus_infinity() -> None:
    q, k, _ = heads(4)
    base = CAUSAL.clone()
    base[10] = False
    mask = topk_mask(q, k, config=SparseKConfig(min_context=0), attn_mask=base)
    assert (mask[:, :, 10] == -torch.inf).all()
    assert (mask[:, :, 11] == 0).any()
