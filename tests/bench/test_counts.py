from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsek import SparseKConfig
from sparsek.bench.counts import scores_used
from sparsek.kernels import reference
from sparsek.problem import NO_VALUES, make_problem


@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_counts_follow_the_formula(top_k: int) -> None:
    """Row i sees i + 1 keys and keeps min(i + 1, sinks + window + K): the always-kept do not count for K."""
    n, layers, heads = 100, 3, 2
    config = SparseKConfig(top_k=top_k, sinks=2, window=4, dense_layers=(1,), min_context=0)
    full = n * (n + 1) // 2
    sparse = sum(min(i + 1, 2 + 4 + top_k) for i in range(n))
    assert scores_used(config, n, layers, heads) == (heads * (2 * sparse + full), heads * 3 * full)


@pytest.mark.parametrize("stride", [0, 1, 3, 7])
@pytest.mark.parametrize(
    ("sinks", "window", "top_k"), [(0, 0, 1), (4, 0, 0), (0, 5, 8), (9, 16, 3), (1, 16, 300)]
)
def test_counts_are_those_of_the_reference(sinks: int, window: int, stride: int, top_k: int) -> None:
    config = replace(SparseKConfig.pure(7), sinks=sinks, window=window, stride=stride, top_k=top_k)
    for n in (1, 2, 17, 90):
        x = np.zeros((1, 1, n, 1), np.float32)
        problem = make_problem(x, x, NO_VALUES, config=config, is_causal=True)
        assert scores_used(config, n, 1, 1)[0] == reference.select(problem).counts.sum()


def test_dense_attention_uses_all() -> None:
    assert scores_used(None, 10, 2, 3) == (330, 330)
    assert scores_used(SparseKConfig(min_context=11), 10, 2, 3) == (330, 330)


def test_budgets_per_layer() -> None:
    config = SparseKConfig.pure((1, 2))
    assert scores_used(config, 4, 2, 1) == (4 + (1 + 2 + 2 + 2), 20)
