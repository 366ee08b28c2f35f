from __future__ import annotations

import pytest

from sparsek.bench.timing import alternate, are_wide, is_wide, ratio


def test_calls_alternate_and_the_order_turns() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    steps: list[int] = []
    samples = alternate([lambda: call("a", 1.0), lambda: call("b", 2.0)], 3, lambda: steps.append(1))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == [[1.0] * 3, [2.0] * 3]
    assert len(steps) == 6


def test_ratio_is_the_median_of_pairs_with_its_quartiles() -> None:
    assert ratio([2.0, 4.0, 6.0, 8.0, 10.0], [1.0] * 5) == (6.0, 4.0, 8.0)
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_median_says_little_where_the_middle_half_is_wide() -> None:
    assert not is_wide(2.0, 1.92, 2.1)
    assert is_wide(2.0, 1.92, 2.15)
    assert not are_wide([1.0, 5.0, 1.0, 1.05, 1.0])  # one that differs is no half
    assert are_wide([1.0, 1.2, 1.4])
    assert not are_wide([3.0])
