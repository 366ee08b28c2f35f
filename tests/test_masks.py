"""Masks that only forbid are known as such, whatever they forbid with; others say that they are slow."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from sparsek import SparseKConfig, attention
from sparsek.kernels import dispatch, reference

RULE = SparseKConfig(top_k=9, sinks=2, window=4, min_context=0, dense_layers=())
LOW = {
    "-inf": (-torch.inf, torch.float32),
    "-1e9": (-1e9, torch.float32),
    "-1e4": (-1e4, torch.float32),
    "-1e4, bfloat16": (-1e4, torch.bfloat16),
    **{
        f"least {dtype}": (torch.finfo(dtype).min, dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
}


def inputs() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, 150, 16, generator=rng) for h in (4, 2, 2))


@pytest.mark.parametrize("rule", [RULE, SparseKConfig.pure(150)], ids=["sparse", "dense"])
@pytest.mark.parametrize(("low", "dtype"), LOW.values(), ids=LOW)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_mask_that_only_forbids(
    low: float, dtype: Any, library: str, rule: SparseKConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs()
    allowed = torch.ones(150, 150, dtype=torch.bool).tril()
    allowed[:, 40:60] &= torch.eye(150, dtype=torch.bool)[:, 40:60]
    mask: Any = torch.zeros(150, 150, dtype=dtype).masked_fill(~allowed, low)
    if library == "numpy":
        if dtype == torch.bfloat16:
            pytest.skip("NumPy has none")
        q, k, v, allowed, mask = (x.numpy() for x in (q, k, v, allowed, mask))
    monkeypatch.setattr(reference, "attention", None)  # the slow way
    expected = attention(q, k, v, config=rule, attn_mask=allowed)
    got = attention(q, k, v, config=rule, attn_mask=mask)
    np.testing.assert_array_equal(got, expected)


def test_a_bias_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = inputs()
    dispatch._tell_slow.cache_clear()
    with caplog.at_level(logging.WARNING, "sparsek"):
        for _ in range(2):
            attention(q, k, v, config=RULE, attn_mask=torch.full((150, 150), -8.0).tril())
    assert [record.message for record in caplog.records] == [
        "a mask that adds numbers to the scores is slow: the reference computes it"
    ]
