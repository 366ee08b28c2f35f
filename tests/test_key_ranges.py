"""key_ranges(): two numbers a row, or None for masks of another kind."""

from __future__ import annotations

import pytest
import torch

from sparsek import SparseKConfig
from sparsek.key_ranges import key_ranges
from sparsek.problem import make_problem


def ranges(mask: torch.Tensor, *, causal: bool = False) -> tuple[list[list[int]], list[list[int]]] | None:
    """Of a mask of the last rows: what is found, as lists."""
    found = key_ranges(mask, first_position=mask.shape[3] - mask.shape[2], is_causal=causal)
    return None if found is None else (found[0].tolist(), found[1].tolist())


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("numbers", [False, True])
def test_any_ranges(numbers: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsek.key_ranges._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    stops = (torch.rand(3, 40, generator=generator) * torch.arange(22, 62)).long()
    starts = (torch.rand(3, 40, generator=generator) * 1.2 * stops).long()
    key = torch.arange(61)
    mask = ((key >= starts[..., None]) & (key < stops[..., None]))[:, None]
    if numbers:
        mask = torch.zeros(mask.shape, dtype=torch.float16).masked_fill(~mask, -torch.inf)
    seen = starts < stops
    want = [torch.where(seen, x, 0).tolist() for x in (starts, stops)]
    assert ranges(mask) == (want[0], want[1])
    assert ranges(mask.expand(3, 4, 40, 61)) == (want[0], want[1])
    assert ranges(mask.repeat(1, 2, 1, 1), causal=True) == (want[0], want[1])


def test_causality_cuts_them() -> None:
    mask = torch.tensor([False, True, True, True, False])[None, None, None].expand(2, 1, 5, 5)
    assert ranges(mask, causal=True) == ([[0, 1, 1, 1, 1]] * 2, [[0, 2, 3, 4, 4]] * 2)
    assert ranges(mask) is None
    assert ranges(mask[:, :, 3:]) == ([[1, 1]] * 2, [[4, 4]] * 2)


def test_masks_of_other_kinds() -> None:
    mask = causal_mask(7, 9).repeat(1, 2, 1, 1)
    assert ranges(mask) is not None
    gap, later, by_head = mask.clone(), mask.clone(), mask.clone()
    gap[0, :, 5, 3] = False
    later[0, :, 2, 5] = True
    by_head[0, 1, 6, 0] = False
    assert [ranges(x) for x in (gap, later, by_head)] == [None] * 3
    for number in (1.0, torch.nan, torch.inf, torch.finfo(torch.float32).min):
        numbers = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert ranges(numbers) is not None
        numbers[0, :, 6, 2] = number
        assert ranges(numbers) is None


@pytest.mark.parametrize("shape", [(2, 1, 0, 5), (2, 1, 3, 0)])
def test_nothing_to_see(shape: tuple[int, ...]) -> None:
    assert ranges(torch.ones(shape, dtype=torch.bool)) == ([[0] * shape[2]] * 2,) * 2


def test_a_problem_has_them_for_each_entry_of_the_batch_and_looks_once() -> None:
    q, k = torch.zeros(3, 2, 7, 4), torch.zeros(3, 1, 9, 4)
    p = make_problem(q, k, k, config=SparseKConfig(), attn_mask=causal_mask(7, 9))
    assert p.ranges is not None
    assert p.ranges[1].tolist() == [list(range(3, 10))] * 3
    assert p.ranges is p.ranges
    rows = p.rows(slice(2, 4)).ranges
    assert rows is not None
    assert rows[1].tolist() == [[5, 6]] * 3
    assert make_problem(q, k, k, config=SparseKConfig(), is_causal=True).ranges is None
