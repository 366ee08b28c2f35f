"""KeyIndex: attention with it is attention without it, whatever happened to the cache in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsek import KeyIndex, SparseKConfig, attention

from .strategies import examples

CONFIG = SparseKConfig(top_k=9, sinks=2, window=10, min_context=0, dense_layers=())


def cache(tokens: int, *, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, 16, generator=rng), torch.randn(batch, 2, tokens, 8, generator=rng)


def attend(k: Any, v: Any, queries: int, index: KeyIndex | None, config: SparseKConfig = CONFIG) -> Any:
    q = torch.randn(k.shape[0], 6, queries, 16, generator=torch.Generator().manual_seed(k.shape[2]))
    return attention(q, k, v, config=config, is_causal=True, index=index, backend="cpu")


def assert_index_changes_nothing(k: Any, v: Any, index: KeyIndex, queries: int = 2) -> None:
    got = attend(k, v, queries, index)
    assert torch.equal(got, attend(k, v, queries, KeyIndex()))
    # Few rows without an index are scored in full, and add up the tail's mean scores in another order.
    torch.testing.assert_close(got, attend(k, v, queries, None), rtol=0, atol=1e-6)
    assert index.length == k.shape[2]


STEPS = st.lists(
    st.tuples(st.just("append"), st.integers(1, 90))
    | st.tuples(st.just("crop"), st.integers(1, 150))
    | st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    min_size=1,
    max_size=12,
)


@examples(80)
@given(STEPS)
def test_follows_a_cache_that_grows_is_cropped_and_reordered(steps: list[tuple[str, Any]]) -> None:
    k, v = cache(50)
    index = KeyIndex()
    assert_index_changes_nothing(k, v, index, 50)
    for number, (step, value) in enumerate(steps):
        if step == "append":
            more_k, more_v = cache(value, seed=number + 1)
            k, v = torch.cat([k, 3 * more_k], 2), torch.cat([v, more_v], 2)
        elif step == "crop":
            left = max(20, k.shape[2] - value)  # with fewer everything is kept, and no index used
            k, v = k[:, :, :left], v[:, :, :left]
            index.truncate(k.shape[2])
        else:
            k, v = k[value], v[value]
            index.reorder(value)
        assert_index_changes_nothing(k, v, index)


def test_steps_cost_what_is_new() -> None:
    """Keys that the index holds are not read again: it does not see that they changed."""
    k, v = cache(5000, batch=1)
    index = KeyIndex()
    attend(k, v, 1, index)
    before = attend(k, v, 1, index, SparseKConfig.pure(1))
    best = before[0, 0, 0]
    row = (v[0, 0] == best).all(-1).nonzero().item()
    k[0, 0, (row + 100) % 5000] = 100 * k[0, 0, row]  # would win
    assert torch.equal(attend(k, v, 1, index, SparseKConfig.pure(1))[0, 0, 0], best)
    index.truncate(0)
    assert_index_changes_nothing(k, v, index)


def test_the_number_of_batch_entries_may_change() -> None:
    k, v = cache(200)
    index = KeyIndex()
    attend(k, v, 1, index)
    index.reorder([1, 1, 0])
    assert_index_changes_nothing(k[[1, 1, 0]], v[[1, 1, 0]], index)


def test_a_copy_goes_its_own_way() -> None:
    k, v = cache(200)
    index = KeyIndex()
    attend(k, v, 1, index)
    twin = copy.deepcopy(index)
    more_k, more_v = cache(70, seed=5)
    assert_index_changes_nothing(torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), twin)
    assert index.length == 200
    assert_index_changes_nothing(torch.cat([k, -more_k], 2), torch.cat([v, more_v], 2), index)


@pytest.mark.parametrize("change", ["shorter", "more batch entries", "other head size", "bfloat16"])
def test_a_cache_it_cannot_belong_to_is_indexed_anew(change: str) -> None:
    index = KeyIndex()
    attend(*cache(200), 1, index)
    k, v = cache(100, seed=3) if change == "shorter" else cache(300, batch=3, seed=3)
    if change == "other head size":
        v = v[..., :4]
    if change == "bfloat16":
        index.truncate(0)
        k, v = k.bfloat16(), v.bfloat16()
        q = torch.ones(3, 2, 1, 16, dtype=torch.bfloat16)
        with_index = attention(q, k, v, config=CONFIG, index=index)
        torch.testing.assert_close(with_index, attention(q, k, v, config=CONFIG), rtol=1e-2, atol=1e-2)
        return
    assert_index_changes_nothing(k, v, index)


def test_other_instruction_set_indexes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = cache(300)
    index = KeyIndex()
    attend(k, v, 1, index)
    monkeypatch.setenv("SPARSEK_ISA", "portable")
    assert_index_changes_nothing(k, v, index)


def test_is_small() -> None:
    k, v = (torch.zeros(1, 2, 4096, 64) for _ in range(2))
    index = KeyIndex()
    assert (index.length, index.nbytes) == (0, 0)
    attention(torch.zeros(1, 2, 1, 64), k, v, config=CONFIG, index=index, is_causal=True)
    assert k.numel() <= index.nbytes < 1.2 * k.numel()
    assert repr(index) == f"KeyIndex(length=4096, nbytes={index.nbytes})"


def test_errors_quote_what_was_given() -> None:
    k, v = cache(10)
    with pytest.raises(ValueError, match="length = -1: must be 0 or more"):
        KeyIndex().truncate(-1)
    with pytest.raises(TypeError, match=r"index = 'yes': must be a sparsek.KeyIndex, or None"):
        attend(k, v, 1, "yes")  # type: ignore[arg-type]
