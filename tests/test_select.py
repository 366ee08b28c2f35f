"""select(): the kept set is the one of the definition, for every kind of call; and how it is written down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsek import Selection, SparseKConfig, attention, select, topk_mask

from . import oracle
from .strategies import Call, Case, cases, examples


def kept_keys(config: SparseKConfig, scores: list[float], **options: Any) -> list[int]:
    """The keys that one query keeps, of keys with these scores; the query is the last position."""
    q = np.ones((1, 1, 1, 1))
    k = np.array(scores, dtype=float).reshape(1, 1, -1, 1)
    selection = select(q, k, config=config, scale=1.0, **options)
    return selection.indices[0, 0, 0, : selection.counts[0, 0, 0]].tolist()


def sparse(top_k: int, **fields: Any) -> SparseKConfig:
    """Only what is named is kept."""
    return SparseKConfig(
        **{"top_k": top_k, "sinks": 0, "window": 0, "dense_layers": (), "min_context": 0, **fields}
    )


@examples(250)
@given(cases())
def test_kept_set_is_the_one_of_the_definition(case: Case) -> None:
    call = case.build()
    oracle.assert_kept(call, np.asarray(select(call.q, call.k, **call.options).to_mask()))


@examples(150)
@given(cases(), st.sampled_from((1e-4, 0.01, 0.05, 0.3, 1.0)))
def test_keys_with_a_share_of_the_softmax(case: Case, share: float) -> None:
    call = case.build()
    config = replace(call.config, top_k="auto", min_share=share)
    call = replace(call, config=config)
    every = np.asarray(select(call.q, call.k, backend="reference", **call.options).to_mask())
    oracle.assert_shares(call, every)
    # A count limits it: the best of these.
    limited = replace(call, config=replace(config, top_k=3))
    few = np.asarray(select(call.q, call.k, backend="reference", **limited.options).to_mask())
    always = _always(limited)
    assert ((few & always) == always).all()
    chosen, others = few & ~always, every & ~always
    assert not (chosen & ~others).any()
    assert (chosen.sum(-1) == np.minimum(others.sum(-1), 3)).all()
    for where, row in oracle.rows(call):
        worst = min((row.scores[j] for j in np.flatnonzero(chosen[where])), default=0)
        eps = 1e-5 * max(1, row.magnitude)
        assert all(row.scores[j] <= worst + eps for j in np.flatnonzero((others & ~chosen)[where]))


def test_no_row_is_left_without_a_key_by_share() -> None:
    """No key of a flat row has the share: then the last one is kept."""
    q, k = np.zeros((1, 1, 300, 8), np.float32), np.ones((1, 1, 300, 8), np.float32)
    for backend in ("cpu", "reference"):
        config = replace(SparseKConfig.pure("auto"), min_share=0.5)
        counts = select(q, k, config=config, is_causal=True, backend=backend).counts
        assert counts.min() == 1
        out = attention(q, k, k, config=config, is_causal=True, backend=backend)
        assert np.allclose(out, k, atol=1e-5)


def test_no_keys_at_all() -> None:
    for config in (SparseKConfig(min_context=0, dense_layers=()), SparseKConfig(4, min_context=0)):
        q, k = np.ones((1, 2, 3, 8), np.float32), np.ones((1, 1, 0, 8), np.float32)
        assert not attention(q, k, k, config=config).any()
        assert select(q, k, config=config).counts.max() == 0


def test_the_mask_of_a_softcap_is_what_select_keeps() -> None:
    generator = np.random.default_rng(0)
    q, k = (8 * generator.standard_normal((1, 2, 90, 16)).astype(np.float32) for _ in range(2))
    given = {"config": SparseKConfig(min_share=0.02, min_context=0), "is_causal": True, "softcap": 5.0}
    mask = topk_mask(q, k, **given)
    assert np.array_equal(mask == 0, select(q, k, **given).to_mask())
    without = topk_mask(q, k, **{**given, "softcap": None})
    assert not np.array_equal(mask, without)


def _always(call: Call) -> np.ndarray[Any, Any]:
    """The keys that are kept whatever their scores are."""
    found = np.zeros((*call.q.shape[:3], call.k.shape[2]), dtype=bool)
    for where, row in oracle.rows(call):
        found[where][list(row.always)] = True
    return found


@examples(100)
@given(cases())
def test_indices_rise_and_are_padded_with_minus_one(case: Case) -> None:
    call = case.build()
    selection = select(call.q, call.k, **call.options)
    indices, counts = np.asarray(selection.indices), np.asarray(selection.counts)
    assert indices.dtype == counts.dtype == np.int32
    assert selection.num_keys == case.num_keys
    assert type(selection.indices) is type(call.q)
    assert counts.shape == indices.shape[:3] == call.q.shape[:3]
    slot = np.arange(indices.shape[3])
    assert np.array_equal(indices >= 0, slot < counts[..., None])
    rises = indices[..., 1:] > indices[..., :-1]
    assert (rises | (slot[1:] >= counts[..., None])).all()
    assert indices.max(initial=-1) < case.num_keys
    assert np.array_equal(np.asarray(selection.to_mask()).sum(-1), counts)


def test_equal_scores_go_to_the_lower_position() -> None:
    assert kept_keys(sparse(3), [7.0] * 100) == [0, 1, 2]
    assert kept_keys(sparse(3), [1, 2, 2, 3, 2, 2]) == [1, 2, 3]


def test_negative_scores_are_kept_before_no_key_at_all() -> None:
    assert kept_keys(sparse(2), [-5, -3, -4]) == [1, 2]


def test_top_k_counts_only_keys_that_are_not_kept_anyway() -> None:
    scores = [9, 8, 1, 2, 3, 4, 5, 6]
    assert kept_keys(sparse(2, sinks=2), scores) == [0, 1, 6, 7]
    assert kept_keys(sparse(1, window=3), scores) == [0, 5, 6, 7]
    assert kept_keys(sparse(1, stride=4), scores) == [0, 1, 4]


def test_zero_top_k_keeps_the_always_kept_keys_alone() -> None:
    assert kept_keys(sparse(0, sinks=1, window=2), [5.0] * 8) == [0, 6, 7]


def test_window_reaches_back_over_forbidden_positions() -> None:
    """It is the last allowed positions that count, not the last positions: padding does not use it up."""
    mask = np.array([True, True, True, False, True, False, False, True])
    assert kept_keys(sparse(0, window=3), [0.0] * 8, attn_mask=mask) == [2, 4, 7]
    assert kept_keys(sparse(0, window=2), [0.0] * 8, attn_mask=~mask) == [5, 6]


def test_sinks_are_positions_and_must_be_allowed() -> None:
    """Left padding does not move the sinks on to the first allowed key."""
    mask = np.arange(8) >= 2
    assert kept_keys(sparse(0, sinks=4), [0.0] * 8, attn_mask=mask) == [2, 3]
    assert kept_keys(sparse(1, sinks=2), [0, 0, 0, 1, 0, 0, 0, 0], attn_mask=mask) == [3]


def test_stride_keeps_only_allowed_multiples() -> None:
    mask = np.arange(8) != 3
    assert kept_keys(sparse(0, stride=3), [0.0] * 8, attn_mask=mask) == [0, 6]


def test_additive_mask_changes_which_keys_are_best() -> None:
    bias = np.array([0, 3, 0, 0.5])
    assert kept_keys(sparse(2), [1, 0, 2, 1], attn_mask=bias) == [1, 2]
    assert kept_keys(sparse(2), [1, 0, 2, 1], attn_mask=np.where(bias == 3, -np.inf, bias)) == [2, 3]


def test_softcap_comes_before_the_mask() -> None:
    """Capped at 1, scores of 50 and 60 are equal, and the mask decides between them."""
    bias = np.array([0.5, 0, 0])
    assert kept_keys(sparse(1), [50, 60, 0], attn_mask=bias) == [1]
    assert kept_keys(sparse(1), [50, 60, 0], attn_mask=bias, softcap=1.0) == [0]


@pytest.mark.parametrize("num_queries", [1, 3, 5, 8])
def test_queries_are_the_last_positions(num_queries: int) -> None:
    """Bottom-right: the last query sees every key; with more queries than keys the first ones see none."""
    q, k = np.ones((1, 1, num_queries, 2)), np.ones((1, 1, 5, 2))
    counts = select(q, k, config=SparseKConfig.pure(4), is_causal=True).counts[0, 0]
    assert counts.tolist() == [min(4, max(0, 5 - num_queries + i + 1)) for i in range(num_queries)]


def test_window_without_causality_still_ends_at_the_query() -> None:
    q, k = np.ones((1, 1, 4, 1)), np.ones((1, 1, 6, 1))
    selection = select(q, k, config=sparse(0, window=2))
    assert selection.indices[0, 0].tolist() == [[1, 2], [2, 3], [3, 4], [4, 5]]


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 2, 0, 0)])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_empty_batches_queries_and_keys(shape: tuple[int, int, int, int], library: str) -> None:
    batch, heads, num_queries, num_keys = shape
    q, k = np.ones((batch, heads, num_queries, 8)), np.ones((batch, 1, num_keys, 8))
    if library == "torch":
        q, k = torch.from_numpy(q), torch.from_numpy(k)
    selection = select(q, k, config=sparse(2, sinks=1))
    assert tuple(selection.counts.shape) == (batch, heads, num_queries)
    assert tuple(selection.to_mask().shape) == shape


@examples(50)
@given(cases(library="numpy"))
def test_selection_of_a_mask_is_that_mask_again(case: Case) -> None:
    call: Call = case.build()
    kept = np.random.default_rng(case.seed).random((*call.q.shape[:3], case.num_keys)) < 0.3
    selection = Selection.from_kept(kept, width=int(kept.sum(-1).max()))
    assert np.array_equal(selection.to_mask(), kept)
    assert np.array_equal(Selection.from_kept(kept, width=case.num_keys).to_mask(), kept)
