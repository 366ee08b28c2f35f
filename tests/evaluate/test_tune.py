"""Tuning, on the embedded model at a context that takes seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import itertools

import torch

from sparsek import SparseKConfig, attention
from sparsek.bench.text import read_text
from sparsek.engines.base import Engine, open_engine
from sparsek.evaluate import sensitivity
from sparsek.evaluate.journal import Journal
from sparsek.evaluate.quality import Windows, evaluate
from sparsek.evaluate.sensitivity import DroppedMass
from sparsek.evaluate.tune import BUDGETS, Target, Tuner
from sparsek.problem import make_problem

CONTEXT = 160
FORM = SparseKConfig(top_k=8, min_context=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("transformers", None)


def tuner(engine: Engine, target: Target, file: Path | None = None, form: SparseKConfig = FORM) -> Tuner:
    windows = Windows(engine.encode(read_text(None)[1]), CONTEXT)
    return Tuner(engine, windows, form, target, "x", Journal(file, {}))


@pytest.mark.model
def test_finds_fewer_keys_than_one_k_and_resumes(engine: Engine, tmp_path: Path) -> None:
    target = Target(max_kl=0.02)
    first = tuner(engine, target, tmp_path / "j")
    record = first.tune()
    assert record.met
    assert record.tuned["kl"] <= 0.02
    assert record.uniform is not None
    assert record.saved is not None
    assert record.saved > 0.25
    config = SparseKConfig.from_dict(record.config)
    assert isinstance(config.top_k, tuple)
    assert len(config.top_k) == engine.num_layers

    # The same numbers from the other code: what tuning measured, and what was held back.
    tokens = engine.encode(read_text(None)[1])
    tuned, held = (
        evaluate(engine, [config], Windows(tokens, CONTEXT, first=i), text_name="x")[0] for i in (0, 1)
    )
    # One token in four was predicted in tuning.
    assert tuned.kl_mean == pytest.approx(record.tuned["kl"], rel=1)
    assert held.kl_mean == record.held["kl_mean"]

    again = tuner(engine, target, tmp_path / "j")
    again._measured = None  # type: ignore[assignment, method-assign]  # nothing is left to measure
    resumed = again.tune()
    assert (resumed.config, resumed.tuned, resumed.frontier) == (
        record.config,
        record.tuned,
        record.frontier,
    )


@pytest.mark.model
def test_shares_are_tried_and_their_keys_counted(engine: Engine) -> None:
    made = tuner(engine, Target(max_kl=0.02))
    point = made._one_share()
    assert point.kl <= 0.02
    config = SparseKConfig.from_dict(point.config)
    assert (config.top_k, config.min_share > 0) == ("auto", True)
    tokens = engine.encode(read_text(None)[1])
    record = evaluate(engine, [config], Windows(tokens, CONTEXT), text_name="x")[0]
    dense = (CONTEXT + 1) / 2
    kept = [dense if keys is None else keys for keys in record.kept]
    assert point.keys == pytest.approx(sum(kept) / len(kept), rel=0.1)


@pytest.mark.model
def test_an_impossible_target_names_the_best_that_was_found(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"no configuration reaches speed-up >= 1000; the best found is \d"):
        tuner(engine, Target(min_speedup=1000)).tune()


def test_what_cannot_be_tuned_is_said(engine: Engine) -> None:
    with pytest.raises(ValueError, match="dense below min_context = 2048"):
        tuner(engine, Target(max_kl=0.1), form=SparseKConfig()).tune()
    windows = Windows(engine.encode("a short text"), CONTEXT)
    with pytest.raises(ValueError, match="the text has 3 tokens, 2 window"):
        Tuner(engine, windows, FORM, Target(max_kl=0.1), "x", Journal(None, {})).tune()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a target is one of"),
        ({"max_kl": 0.1, "min_speedup": 2.0}, "a target is one of"),
        ({"max_kl": 0.0}, "max_kl = 0.0: must be above 0"),
        ({"max_kl": math.nan}, "max_kl = nan: must be above 0"),
        ({"max_ppl_ratio": 1.0}, "max_ppl_ratio = 1.0: must be above 1"),
        ({"min_speedup": math.inf}, "min_speedup = inf: must be above 1"),
    ],
)
def test_targets_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**fields)


@pytest.mark.model
def test_on_a_gpu_keys_are_those_of_the_lists(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a context where attention is dense for that is faster is refused. It still runs on the CPU here."""
    config = replace(FORM, dense_layers=())
    counted = tuner(engine, Target(max_kl=0.1))
    on_cpu = counted._measured(config)["keys"]
    monkeypatch.setattr(engine, "device", "cuda")
    assert counted._measured(config)["keys"] == pytest.approx(on_cpu + 5 * 8, rel=0.25)
    with pytest.raises(ValueError, match="context = 160: attention on a GPU is dense at this length"):
        tuner(engine, Target(max_kl=0.1)).tune()


def test_dropped_mass_of_a_case_worked_by_hand() -> None:
    """Scores 0 .. 3; the last position is always kept."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([3.0, 1.0, 2.0, 0.0]).view(1, 1, 4, 1)
    form = SparseKConfig(top_k=1, sinks=0, window=1, min_context=0)
    problem = make_problem(q, k, k, config=form, scale=1.0)
    found, count = sensitivity._dropped(problem, form, (0, 1, 2, 3, 9), rows=8)
    shares = torch.tensor([3.0, 1.0, 2.0, 0.0]).double().softmax(0)
    expected = [shares[[0, 1, 2]].sum(), shares[[1, 2]].sum(), shares[1], 0, 0]
    assert found.tolist() == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert count == 1


def test_dropped_mass_agrees_with_attention_over_the_kept_keys() -> None:
    """With values that are 1, attention without a tail over unnormalised weights is the kept share."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    form = SparseKConfig(top_k=5, sinks=2, window=3, tail="none", dense_layers=(), min_context=0)
    problem = make_problem(q, k, k, config=form, is_causal=True)
    found, count = sensitivity._dropped(problem, form, (5,), rows=1000)
    one_hot = torch.eye(40).expand(1, 2, 40, 40)
    dense = attention(q, k, one_hot, config=SparseKConfig.pure(40), is_causal=True)
    sparse = attention(q, k, one_hot, config=form, is_causal=True)
    kept = (dense * (sparse > 0)).sum(-1)
    assert count == 80
    assert found.item() / count == pytest.approx(1 - kept.mean().item(), abs=1e-5)


def test_between_two_budgets_lies_the_geometric_mean() -> None:
    curve = DroppedMass((0, 10, 20), (0.5, 0.1, 0.001))
    assert curve.at(0) == 0.5
    assert curve.at(15) == pytest.approx(0.01)
    assert curve.at(99) == 0.001
    assert all(a < b for a, b in itertools.pairwise(BUDGETS))


def test_a_layer_whose_k_is_given_alone_is_refused(engine: Engine) -> None:
    config: Any = SparseKConfig(top_k=(8, 8), min_context=0)
    with pytest.raises(ValueError, match="gives 2 values and the model has 30 layers"):
        evaluate(engine, [config], Windows(engine.encode("word " * 99), 64), text_name="x")
