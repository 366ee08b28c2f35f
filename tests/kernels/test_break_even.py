"""Where "auto" on a GPU takes dense attention: decided from sizes, so that no GPU is needed to see it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsek import KeyIndex, SparseKConfig
from sparsek.kernels import break_even, dispatch
from sparsek.kernels.break_even import dense_is_better
from sparsek.policy import AUTO_SHARE
from sparsek.problem import Problem, make_problem

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def auto(
    queries: int,
    keys: int,
    *,
    heads: tuple[int, int] = (32, 8),
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    index: bool = False,
    **more: Any,
) -> Problem:
    """A call as `select = "auto"` has it on a GPU; of these sizes, without their memory."""
    q = torch.zeros(1, dtype=dtype, device=DEVICE).expand(1, heads[0], queries, head_size)
    k = torch.zeros(1, dtype=dtype, device=DEVICE).expand(1, heads[1], keys, head_size)
    config = SparseKConfig(select="tile")
    p = make_problem(q, k, k, config=config, is_causal=True, index=KeyIndex() if index else None, **more)
    return replace(p, rule=replace(p.rule, or_dense=True))


@pytest.mark.parametrize(
    ("queries", "keys", "dense"),
    [
        (4096, 4096, True),
        (8192, 8192, False),
        (131072, 131072, False),
        (64, 8192, True),
        (4096, 32768, False),
    ],
)
def test_prompts(queries: int, keys: int, dense: bool) -> None:
    assert dense_is_better(auto(queries, keys)) == dense


def test_small_models_need_longer_prompts() -> None:
    small: dict[str, Any] = {"heads": (9, 3), "head_size": 64}
    assert dense_is_better(auto(8192, 8192, **small))
    assert not dense_is_better(auto(16384, 16384, **small))
    assert break_even.prompt_is_dense(8192, 8192, 9 * 64)
    assert not break_even.prompt_is_dense(8192, 8192, 32 * 128)
    assert break_even.prompt_is_dense(4096, 4096, 64 * 32 * 128)


@pytest.mark.parametrize(
    ("keys", "index", "dense"), [(131072, True, True), (524288, True, False), (524288, False, True)]
)
def test_steps(keys: int, index: bool, dense: bool) -> None:
    assert dense_is_better(auto(1, keys, index=index)) == dense


def test_what_no_kernel_takes_is_dense_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    break_even._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "sparsek"):
        for _ in range(2):
            assert dense_is_better(auto(8192, 8192, dtype=torch.float32))
            assert dense_is_better(auto(8192, 8192, softcap=30.0))
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "the dtype is float32",
        "softcap is given",
    ]


def test_a_problem_is_settled_once() -> None:
    settled = dispatch.settled(auto(4096, 4096))
    assert settled.keeps_all
    assert not settled.rule.or_dense
    assert dispatch.settled(settled) is settled
    sparse = dispatch.settled(auto(8192, 8192))
    assert sparse.rule.min_share == AUTO_SHARE
    assert not sparse.rows(slice(0, 64)).rule.or_dense
    # Whoever names a kernel gets it.
    assert not dispatch.settled(auto(4096, 4096), "triton_prefill").keeps_all
