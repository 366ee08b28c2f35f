"""What is captured equals what the public functions and a few lines of PyTorch give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sparsek
from sparsek import SparseKConfig
from sparsek.engines.base import Engine
from sparsek.problem import Problem
from sparsek.report.tensors import SentenceAttention, capture, mean_weight, small_rule

from . import samples

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def problems(engine: Engine) -> dict[int, Problem]:
    found: dict[int, Problem] = {}
    with engine.observed(lambda layer, problem, _: found.update({layer: problem})):
        list(engine.prompt(engine.encode(samples.SENTENCE), SparseKConfig.pure(1000)))
    return found


def dense(p: Problem, head: int) -> torch.Tensor:
    key = p.k[0, head // (p.q.shape[1] // p.k.shape[1])]
    scores = p.q[0, head].double() @ key.double().T * p.q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)


def test_scores_and_weights_are_the_models(
    attention: SentenceAttention, problems: dict[int, Problem]
) -> None:
    scores = dense(problems[11], 3)
    assert np.allclose(attention.scores[attention.allowed], scores[scores > -torch.inf], atol=1e-4)
    assert np.allclose(attention.dense, scores.softmax(-1), atol=1e-5)
    kept = torch.from_numpy(attention.kept)
    assert np.allclose(attention.sparse, scores.masked_fill(~kept, -torch.inf).softmax(-1), atol=1e-5)


def test_kept_set_is_that_of_select(attention: SentenceAttention, problems: dict[int, Problem]) -> None:
    p, config = problems[11], attention.config
    kept = sparsek.select(p.q, p.k, config=config, is_causal=True, backend="reference").to_mask()[0, 3]
    assert np.array_equal(attention.kept, kept)
    mask = sparsek.topk_mask(p.q, p.k, config=config, is_causal=True)[0, 3]
    assert np.array_equal(attention.mask, mask)
    always = sparsek.select(p.q, p.k, config=replace(config, top_k=0), is_causal=True).to_mask()[0, 3]
    assert np.array_equal(attention.always, always)


def test_masks_nest(attention: SentenceAttention) -> None:
    size = attention.size
    assert np.array_equal(attention.allowed, np.tri(size, dtype=bool))
    assert not (attention.kept & ~attention.allowed).any()
    assert np.array_equal(attention.best, attention.kept & ~attention.always)
    assert attention.best.sum(-1).tolist() == [min(3, max(0, row - 2)) for row in range(size)]


def test_the_head_taken_has_most_weight_on_its_best_keys(
    engine: Engine, problems: dict[int, Problem]
) -> None:
    config = small_rule(SparseKConfig(), 3)
    taken = capture(engine, samples.SENTENCE, config)
    weights = {}
    for layer, p in problems.items():
        kept, always = (
            sparsek.select(p.q, p.k, config=c, is_causal=True).to_mask()[0]
            for c in (config, replace(config, top_k=0))
        )
        for head in range(engine.num_heads):
            weights[layer, head] = float((dense(p, head).softmax(-1) * (kept & ~always)[head]).sum())
    assert weights[taken.layer, taken.head] == pytest.approx(max(weights.values()), rel=1e-5)
    assert mean_weight(taken, taken.best) == pytest.approx(max(weights.values()) / taken.size, rel=1e-5)
    assert taken.chosen
    of_layer = capture(engine, samples.SENTENCE, config, layer=5)
    assert of_layer.head == max(range(engine.num_heads), key=lambda head: weights[5, head])


def test_small_rule_keeps_the_form() -> None:
    assert small_rule(SparseKConfig(), 4) == SparseKConfig(4, 1, 2, 0, "none", (), 0, select="query")
    assert small_rule(SparseKConfig.pure(64), 4) == SparseKConfig.pure(4)


@pytest.mark.parametrize(
    ("sentence", "options", "message"),
    [
        ("", {}, "the sentence is empty: ''"),
        (" \n", {}, "the sentence is empty"),
        ("word " * 65, {}, r"at most 64 can be drawn: 'word word"),
        ("A cat.", {"layer": 30}, "layer = 30: the model has layers 0 to 29"),
        ("A cat.", {"layer": -1}, "layer = -1"),
        ("A cat.", {"head": 9}, "head = 9: the model has heads 0 to 8"),
    ],
)
def test_errors(engine: Engine, sentence: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture(engine, sentence, small_rule(SparseKConfig(), 4), **options)  # type: ignore[arg-type]


def test_one_token_is_enough(engine: Engine) -> None:
    attention = capture(engine, "A", small_rule(SparseKConfig(), 4), layer=0, head=0)
    assert (attention.size, attention.sparse.tolist()) == (1, [[1.0]])
