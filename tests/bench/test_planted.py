from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsek import SparseKConfig, select
from sparsek.bench.inputs import Inputs
from sparsek.bench.kept import mean_kept, usual_kept
from sparsek.bench.planted import planted_inputs
from sparsek.problem import make_problem

SHARE = SparseKConfig(select="tile", min_share=0.02)


def planted(kept: int, tokens: int, **given: Any) -> Inputs:
    shape = {"queries": tokens, "heads": 2, "kv_heads": 1, "head_dim": 64}
    return planted_inputs(kept=kept, tokens=tokens, **{**shape, **given})


@pytest.mark.parametrize(
    ("select_by", "number", "share"), [("tile", 200, 0.0), ("tile", 110, 0.02), ("query", 130, 0.0)]
)
def test_rows_keep_as_many_as_wanted(select_by: str, number: int, share: float) -> None:
    """Without a share by the usual one."""
    config = SparseKConfig(select=select_by, min_share=share, min_context=0, dense_layers=())
    x = planted(number, 1024, config=config)
    config = replace(config, min_share=share or {"tile": 0.004, "query": 0.002}[select_by])
    assert abs(mean_kept(make_problem(x.q, x.k, x.v, config=config, is_causal=True)) - number) <= 4
    counts = select(x.q, x.k, config=config, is_causal=True).counts
    assert abs(counts.float().mean() - number) <= 0.1 * number


def test_kept_keys_lie_as_those_of_a_real_head() -> None:
    """What was counted in SmolLM2 at 8192 tokens with a share of 0.002: see planted.py."""
    tokens, rows = 8192, 512
    config = SparseKConfig(select="tile", min_share=0.002, min_context=0, dense_layers=())
    x = planted(450, tokens, queries=rows, heads=4, head_dim=128, config=config)
    kept = select(x.q, x.k, config=config, is_causal=True).to_mask()[0].any(0).unflatten(0, (-1, 64)).any(1)
    shared, beside, late, blocks = [], [], [], []
    for t in range(1, len(kept)):
        before = tokens - rows + 64 * t - 15
        of_tile = kept[t, :before]
        shared.append((of_tile & kept[t - 1, :before]).sum() / of_tile.sum())
        beside.append((of_tile[1:] & of_tile[:-1]).sum() / of_tile.sum())
        late.append(of_tile[-1024:].sum() / of_tile.sum())
        blocks.append(of_tile[: before // 64 * 64].unflatten(0, (-1, 64)).any(1).float().mean())
    means = [torch.stack(x).mean() for x in (shared, beside, late, blocks)]
    assert 0.4 < means[0] < 0.7
    assert 0.4 < means[1] < 0.7
    assert 0.6 < means[2] < 0.9
    assert 0.3 < means[3] < 0.55


def test_the_same_seed_makes_the_same() -> None:
    one, same, other = (planted(110, 1024, config=SHARE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, same.q)
    assert torch.equal(one.k, same.k)
    assert not torch.equal(one.k, other.k)


@pytest.mark.parametrize("kept", [1, 900])
def test_so_many_cannot_be(kept: int) -> None:
    with pytest.raises(ValueError, match=rf"^kept = {kept}: rows of 1024 keys keep "):
        planted(kept, 1024, config=SHARE)


def test_the_usual_number_grows_slower_than_the_context() -> None:
    assert [usual_kept(n) for n in (100, 8192, 131072)] == [29, 450, 2511]
    assert [usual_kept(n, "query") for n in (50, 8192, 131072)] == [50, 117, 172]
