"""Verification must pass what is right and catch what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsek import Selection, SparseKConfig
from sparsek.kernels import dispatch, reference
from sparsek.problem import Problem, make_problem
from sparsek.verify import VerificationError, sample, verify

CONFIG = SparseKConfig(top_k=6, sinks=2, window=3, min_context=0)


@pytest.fixture(params=["torch", "numpy"])
def problem(request: pytest.FixtureRequest) -> Problem:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((1, h, 200, 16)).astype(np.float32) for h in (4, 2, 2)]
    if request.param == "torch":
        arrays = [torch.from_numpy(x) for x in arrays]
    return make_problem(*arrays, config=CONFIG, is_causal=True)


def test_the_reference_passes(problem: Problem) -> None:
    result = verify(problem, reference.attention(problem), rows=40)
    assert result.rows == 40
    assert 0 < result.max_abs_err < 1e-5


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_a_wrong_output_is_caught(problem: Problem, wrong: float) -> None:
    out = reference.attention(problem)
    out[0, 3, 199, 5] += wrong
    with pytest.raises(VerificationError, match="output is off by"):
        verify(problem, out)


@pytest.mark.parametrize("replaced", ["worse", "fewer"])
def test_a_wrong_selection_is_caught(
    problem: Problem, replaced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def select(p: Problem, _backend: str) -> Selection:
        kept = reference.select(p).to_mask()
        row = kept[0, 0, -1]
        best = row.nonzero()[0].reshape(-1)[3] if isinstance(row, np.ndarray) else row.nonzero()[3, 0]
        row[best] = False
        if replaced == "worse":
            scores = (p.q[0, 0, -1] * p.k[0, 0]).sum(-1)
            scores[row] = np.inf
            row[scores.argmin()] = True
        return Selection.from_kept(kept, p.rule.most_kept(p.num_keys))

    monkeypatch.setattr(dispatch, "select", select)
    with pytest.raises(VerificationError, match="dropped key is better"):
        verify(problem, reference.attention(problem))


SHARES = SparseKConfig(min_share=0.02, sinks=2, window=3, min_context=0)
TILES = SparseKConfig(min_share=0.05, sinks=2, window=3, min_context=0, select="tile", tile=32)


@pytest.mark.parametrize(
    "config",
    [SHARES, TILES, replace(SHARES, top_k=3), replace(TILES, top_k=3), replace(TILES, top_k=6, min_share=0)],
)
def test_too_many_keys_are_caught(
    problem: Problem, config: SparseKConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that keeps everything, or forgets the count beside a share, has a right output."""
    p = make_problem(problem.q, problem.k, problem.v, config=config, is_causal=True)
    verify(p, reference.attention(p), backend="reference")
    forgetful = {"top_k": p.num_keys} if config.top_k != "auto" else {"min_share": 0.0}

    def select(part: Problem, _backend: str) -> Selection:
        return reference.select(replace(part, rule=replace(part.rule, **forgetful)))

    monkeypatch.setattr(dispatch, "select", select)
    with pytest.raises(VerificationError, match="keys are chosen"):
        verify(p, reference.attention(replace(p, rule=replace(p.rule, **forgetful))))


def test_a_masked_key_is_caught(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(p: Problem, _backend: str) -> Selection:
        kept = reference.select(p).to_mask()
        kept[0, 0, 0, -1] = True
        return Selection.from_kept(kept, None)

    monkeypatch.setattr(dispatch, "select", select)
    with pytest.raises(VerificationError, match="masked is kept"):
        verify(problem, reference.attention(problem))


def test_a_masked_problem_is_verified_at_the_right_positions(problem: Problem) -> None:
    """Rows are taken out of the middle: their own position decides what the window is."""
    n = problem.num_keys
    xp = torch if isinstance(problem.q, torch.Tensor) else np
    mask = xp.tril(xp.ones((n, n), dtype=xp.bool))
    masked = make_problem(problem.q, problem.k, problem.v, config=CONFIG, attn_mask=mask)
    verify(masked, reference.attention(problem))


@pytest.mark.parametrize(("rows", "wanted"), [(1, 64), (7, 64), (8, 8), (200, 64), (8192, 128), (100, 1)])
def test_sampled_rows_are_spread_and_have_the_last(rows: int, wanted: int) -> None:
    blocks = list(sample(rows, wanted))
    picked = [i for block in blocks for i in range(block.start, block.stop)]
    assert picked == sorted(set(picked))
    assert picked[-1] == rows - 1
    assert len(picked) <= max(8, min(rows, wanted))
