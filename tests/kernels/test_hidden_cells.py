"""What a row may not see has no part in its result, be it NaN or infinity: in every kernel of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sparsek import SparseKConfig, attention

TOKENS = 200
RULES = {
    "dense": SparseKConfig.pure(TOKENS),
    "top-K": SparseKConfig.pure(9),
    "tail": SparseKConfig(top_k=9, sinks=2, window=8, min_context=0, dense_layers=()),
}


def problem(heads: int, queries: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(heads + queries)
    sizes = ((heads, queries, 16), (2, TOKENS, 16), (2, TOKENS, 24))
    return tuple(torch.randn(1, *size, generator=rng) for size in sizes)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("heads", "queries"), [(4, TOKENS), (2, 7), (4, 1), (2, 1), (4, 70)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_hidden_cells(bad: float, heads: int, queries: int, rule: SparseKConfig, backend: str) -> None:
    q, k, v = problem(heads, queries)
    hidden = torch.zeros(TOKENS, dtype=torch.bool)
    hidden[[3, 64, 65, 130]] = True
    mask = (~hidden).expand(queries, TOKENS)
    options: dict[str, Any] = {"config": rule, "attn_mask": mask, "is_causal": True, "backend": backend}
    expected = attention(q, k, v, **options)
    for x, y in (
        (k.masked_fill(hidden[:, None], bad), v),
        (k, v.masked_fill(hidden[:, None], bad)),
        (k, torch.where(hidden[:, None] & (torch.arange(24) == 5), bad, v)),
    ):
        got = attention(q, x, y, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("heads", [4, 2])
def test_rows_that_see_it_are_told_and_no_others(heads: int, backend: str) -> None:
    q, k, v = problem(heads, TOKENS)
    clean = attention(q, k, v, config=RULES["dense"], is_causal=True, backend=backend)
    v[0, 0, 100] = torch.nan
    for queries in (TOKENS, 3):
        rows = q[:, :, :queries] if queries == TOKENS else q[:, :, -queries:]
        got = attention(rows, k, v, config=RULES["dense"], is_causal=True, backend=backend)
        first = heads // 2  # heads that read the first key head
        assert torch.isnan(got[:, :first, -100 if queries == TOKENS else 0 :]).all()
        if queries == TOKENS:
            torch.testing.assert_close(got[:, :first, :100], clean[:, :first, :100])
        torch.testing.assert_close(got[:, first:], clean[:, first:, -queries:])


def test_the_reference_in_numpy() -> None:
    q, k, v = (x.numpy() for x in problem(4, 5))
    mask = np.arange(TOKENS) != 7
    expected = attention(q, k, v, config=RULES["tail"], attn_mask=mask, backend="reference")
    v[:, :, 7] = np.inf
    got = attention(q, k, v, config=RULES["tail"], attn_mask=mask, backend="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
