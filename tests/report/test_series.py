from __future__ import annotations

import pytest

from sparsek import SparseKConfig
from sparsek.report.series import (
    budget,
    budget_text,
    frontier_of_run,
    frontier_of_tuning,
    prompts,
    qualities,
    rule_words,
    same_rule,
    speeds,
    speedups,
    with_mass,
)

from .samples import bench_record, eval_record, tune_record


def test_speeds_are_lines_by_length() -> None:
    records = [bench_record(n, k) for n in (4096, 512) for k in (0, 64)]
    records.append(bench_record(0, 0, n_gen=32))
    dense, sparse = speeds(records)
    assert (dense.label, dense.dense, dense.x, dense.y) == ("dense", True, [512, 4096], [100.0, 100.0])
    assert (sparse.label, sparse.low, sparse.high) == ("Sparse-K, K = 64", [145.0] * 2, [155.0] * 2)
    (ratio,) = speedups(records)
    assert (ratio.y, ratio.low, ratio.high) == ([1.5] * 2, [1.4] * 2, [1.7] * 2)


def test_lines_say_what_tells_them_apart() -> None:
    records = [
        bench_record(512, 0), bench_record(512, 64),
        bench_record(512, 0, backend="flash attention off"), bench_record(512, 64, speedup=2.0),
    ]  # fmt: skip
    assert [line.label for line in speedups(records)] == [
        "Sparse-K, K = 64, flash attention on",
        "Sparse-K, K = 64, flash attention off",
    ]
    (one, two) = qualities([eval_record(16), eval_record(16, text="other.txt")], "kl_mean", "kl_se")
    assert (one.label, two.label) == ("Sparse-K, book.txt", "Sparse-K, other.txt")


def test_qualities_have_their_errors() -> None:
    records = [
        eval_record(64, 0.01),
        eval_record("auto", 0.02, top_k_used=40),
        eval_record(16, 0.1, kl_se=None),
    ]
    (line,) = qualities([*records, eval_record(0, config=None)], "kl_mean", "kl_se")
    assert line.x == [16, 40, 64]
    assert line.y == [0.1, 0.02, 0.01]
    assert line.low == pytest.approx([0.1, 0.019, 0.0095])


def test_budget_by_layer_is_a_mean() -> None:
    config = SparseKConfig(top_k=(8, 16, "auto")).to_dict()
    assert budget(eval_record("per layer", config=config, top_k_used=[8, 16, 30])) == 18
    assert budget(eval_record("per layer", config=SparseKConfig(top_k=(8, 16)).to_dict())) == 12


def test_what_auto_was_is_told_by_the_record_or_not_at_all() -> None:
    """What it means today may be something else."""
    old, new = eval_record("auto"), eval_record("auto", top_k_used=40)
    assert (budget(old), budget_text(old)) == (None, "auto")
    assert (budget(new), budget_text(new)) == (40, "auto (40)")
    assert qualities([old], "kl_mean", "kl_se") == []
    assert [p.label for p in frontier_of_run([old, new], [], lambda _: 1.0)] == ["K = auto (40)"]
    bench = [bench_record(2048, "auto", speedup=1.5), bench_record(2048, "auto", speedup=2.0, top_k_used=40)]
    (point,) = frontier_of_run([new], bench, lambda _: 1.0)
    assert point.speedup == 2.0
    assert [line.label for line in speeds(bench)] == ["Sparse-K, K = auto"]


def test_speed_up_joins_quality_of_the_same_rule_and_length() -> None:
    bench = [bench_record(2048, 64), bench_record(4096, 16), bench_record(2048, 0)]
    points = frontier_of_run([eval_record(16, 0.1), eval_record(64, 0.01)], bench, lambda _: 100.0)
    assert [p.speedup for p in points] == [None, 1.5]
    assert [(p.label, p.keys, p.kl) for p in points] == [("K = 16", 100.0, 0.1), ("K = 64", 100.0, 0.01)]
    (other,) = frontier_of_run([eval_record(64, model="another")], bench, lambda _: 1.0)
    assert other.speedup is None
    assert frontier_of_run([eval_record(64, mass=[])], bench, lambda _: 1.0) == []


def test_below_min_context_rules_differ() -> None:
    one, other = (SparseKConfig(top_k=64, min_context=n).to_dict() for n in (0, 2048))
    assert same_rule(one, other, 2048)
    assert not same_rule(one, other, 2047)
    assert not same_rule(one, None, 4096)


def test_tuning_ends_with_its_answer() -> None:
    points = frontier_of_tuning(tune_record())
    assert [p.step for p in points] == ["one K", "form", "K by layer", "answer"]
    assert (points[-1].keys, points[-1].kl, points[-1].label) == (60.0, 0.004, "K = auto to 16")


def test_mass_is_that_of_the_k_asked_for() -> None:
    records = [eval_record(0, config=None), eval_record(16), eval_record(64)]
    rule = rule_words(SparseKConfig())
    assert with_mass(records, 64, rule) is records[2]
    assert with_mass(records, "auto", rule) is records[1]
    assert with_mass(records[:1], 64, rule) is None
    pure = eval_record(64, config=SparseKConfig.pure(64).to_dict())
    assert with_mass([pure, *records], "auto", rule) is records[1]
    assert with_mass([*records, pure], 64, rule_words(SparseKConfig.pure(64))) is pure


def test_points_that_differ_in_more_than_k_are_on_lines_of_their_own() -> None:
    pure = eval_record(64, config=SparseKConfig.pure(64).to_dict())
    points = frontier_of_run([eval_record(16), eval_record(64), pure], [], lambda _: 1.0)
    assert points[0].line == points[1].line != points[2].line


def test_prompts_leave_generation_out() -> None:
    assert prompts([bench_record(0, 0, n_gen=8), bench_record(8, 0, n_depth=4)]) == []


def test_rules_in_words() -> None:
    assert rule_words(SparseKConfig.pure(8)) == "top-K alone"
    assert rule_words(SparseKConfig()) == "4 sinks, window 16, centroid tail, 1 dense layer"
    assert rule_words(SparseKConfig(sinks=1, stride=8, tail="none", dense_layers=(0, 1))) == (
        "1 sink, window 16, stride 8, 2 dense layers"
    )
