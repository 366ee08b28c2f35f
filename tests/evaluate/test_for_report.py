from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

import torch

from sparsek import SparseKConfig
from sparsek.evaluate import for_report
from sparsek.evaluate.kept_keys import KeptObserver
from sparsek.kernels import dispatch
from sparsek.problem import make_problem


def kept_by(config: SparseKConfig, tokens: int, top_k: int) -> int:
    """Keys kept by all rows of one sparse head, from the rule alone."""
    always = config.sinks + config.window
    return sum(min(row, top_k + min(row, always)) for row in range(1, tokens + 1))


def test_costs_are_counted() -> None:
    config = SparseKConfig(top_k=8, sinks=1, window=4, dense_layers=(0,), min_context=200)
    costs = for_report.costs(config, num_layers=3, num_heads=2, context_length=300)
    assert costs.lengths == (128, 256, 300)
    full = [n * (n + 1) // 2 for n in costs.lengths]
    assert list(costs.layer_dense) == full
    assert list(costs.model_dense) == [6 * n for n in full]
    sparse = [full[0], kept_by(config, 256, 8), kept_by(config, 300, 8)]  # the first is below min_context
    assert list(costs.layer_sparse) == sparse
    assert list(costs.model_sparse) == [2 * (a + 2 * b) for a, b in zip(full, sparse, strict=True)]


def test_costs_by_layer_are_a_mean() -> None:
    config = SparseKConfig(top_k=(8, 16), sinks=1, window=4, dense_layers=(), min_context=0)
    costs = for_report.costs(config, num_layers=2, num_heads=1, context_length=128)
    both = [kept_by(config, 128, k) for k in (8, 16)]
    assert costs.layer_sparse == (sum(both) // 2,)
    assert costs.model_sparse == (sum(both),)


def test_costs_stop_where_counting_takes_long() -> None:
    config = SparseKConfig.pure(1)
    assert for_report.costs(config, 1, 1, 64).lengths == (64,)
    assert for_report.LONGEST == 32768


def test_dense_layers_pay_for_every_key() -> None:
    config = SparseKConfig(top_k=8, sinks=1, window=4, dense_layers=(0,), min_context=0)
    record = {"config": config.to_dict(), "context": 128, "mass": [None, [0.9]]}
    expected = (128 * 129 / 2 + kept_by(config, 128, 8)) / (2 * 128)
    assert for_report.mean_keys(record) == pytest.approx(expected)
    assert for_report.mean_keys({**record, "config": replace(config, dense_layers=()).to_dict()}) < expected


def test_by_share_keys_are_those_of_the_record() -> None:
    config = SparseKConfig(min_share=0.01, min_context=0)
    record = {"config": config.to_dict(), "context": 128, "mass": [None, [0.9]], "kept": [None, 30.0]}
    assert for_report.mean_keys(record) == pytest.approx((129 / 2 + 30) / 2)


def test_by_share_costs_are_what_was_observed() -> None:
    """Of two layers the first is dense; in the other a row keeps what the kernel says."""
    config = SparseKConfig(min_share=0.02, sinks=1, window=4, min_context=200)
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
    p = make_problem(q, k, k, config=replace(config, min_context=0), is_causal=True)
    kept = KeptObserver()
    kept(1, p, None)
    kept(0, p.with_rule(p.rule.dense(300)), None)
    assert kept.layers == [1]
    costs = for_report.costs(config, num_layers=2, num_heads=2, context_length=300, kept=kept)
    assert costs.lengths == (128, 256, 300)
    counts = dispatch.select(p).counts.float().mean(1)[0].cumsum(0)
    full = [n * (n + 1) // 2 for n in costs.lengths]
    assert costs.layer_sparse[0] == full[0]  # shorter than min_context
    for i, n in ((1, 256), (2, 300)):
        assert costs.layer_sparse[i] == pytest.approx(float(counts[n - 1]), rel=0.1)
        assert costs.model_sparse[i] == pytest.approx(2 * (full[i] + costs.layer_sparse[i]), abs=2)


def test_runs_counts_the_steps() -> None:
    configs = [SparseKConfig(top_k=k) for k in (8, 16, 32)]
    assert for_report.runs(configs, [64, 128], 128, repetitions=2) == 2 * (2 + 4)
