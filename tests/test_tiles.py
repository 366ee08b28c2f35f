"""select="tile" in the reference: the definition, written once more from its words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sparsek import SparseKConfig, attention, select

Array = np.ndarray[Any, Any]


def definition(q: Array, k: Array, v: Array, config: SparseKConfig, mask: Array) -> tuple[Array, Array]:
    """(output, kept) of one key head: q [G, Tq, D], k [Tk, D], v [Tk, Dv], mask bool [Tq, Tk], causality in
    it. One tile and one row at a time."""
    group, num_queries, size = q.shape
    num_keys = len(k)
    top_k, tile = config.top_k, config.tile
    assert isinstance(top_k, int)
    kept = np.zeros((num_queries, num_keys), dtype=bool)
    scores = q @ k.T / math.sqrt(size)
    positions = np.arange(num_queries) + num_keys - num_queries
    for t in range(num_keys // tile + 1):
        rows = [i for i in range(num_queries) if positions[i] // tile == t]
        always = {
            j
            for j in range(num_keys)
            if j < config.sinks
            or j > t * tile - max(config.window, 1)
            or (config.stride and j % config.stride == 0)
        }
        best: dict[int, float] = {}
        for i in rows:
            seen = np.flatnonzero(mask[i])
            if not len(seen):
                continue
            for g in range(group):
                shares = scores[g, i, seen] - np.log(np.exp(scores[g, i, seen]).sum())
                for j, share in zip(seen, shares, strict=True):
                    if j not in always:
                        best[j] = max(best.get(j, -math.inf), share)
        chosen = always | set(sorted(best, key=lambda j: (-best[j], j))[:top_k])
        for i in rows:
            kept[i, [j for j in chosen if mask[i, j]]] = True
    out = np.zeros((group, num_queries, v.shape[1]))
    for g, i in np.ndindex(group, num_queries):
        weights = [math.exp(scores[g, i, j]) for j in np.flatnonzero(kept[i])]
        values = [v[j] for j in np.flatnonzero(kept[i])]
        for start in range(0, num_keys - 63, 64) if config.tail == "centroid" else ():
            block = slice(start, start + 64)
            dropped = 64 - kept[i, block].sum()
            if mask[i, block].all() and dropped:
                weights.append(dropped * math.exp(scores[g, i, block].mean()))
                values.append(v[block].mean(0))
        if weights:
            out[g, i] = np.array(weights) @ np.array(values) / sum(weights)
    return out, kept


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "fields"),
    [
        (130, 130, {}),
        (1, 200, {"tile": 32}),
        (70, 333, {"tail": "none", "sinks": 0, "window": 0}),
        (97, 210, {"window": 50, "stride": 7, "tile": 32}),
        (5, 5, {"top_k": 3}),
    ],
)
def test_the_reference_is_the_definition(
    num_queries: int, num_keys: int, fields: dict[str, Any], masked: bool, kind: str
) -> None:
    config = SparseKConfig(**{"select": "tile", "top_k": 9, "min_context": 0, "dense_layers": (), **fields})
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 4, num_queries, 8)) * 2
    k, v = random.normal(size=(2, 2, 2, num_keys, 8))
    mask = np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
    forbidden = random.random((2, 1, num_queries, num_keys)) < 0.3
    forbidden[:, :, num_queries // 2] = True  # a row that sees nothing
    given = ~forbidden if masked else None

    def made(x: Array | None) -> Any:
        return x if x is None or kind == "numpy" else torch.from_numpy(x)

    options: dict[str, Any] = {"config": config, "is_causal": True, "attn_mask": made(given)}
    out = np.asarray(attention(made(q), made(k), made(v), backend="reference", **options))
    kept = np.asarray(select(made(q), made(k), backend="reference", **options).to_mask())
    for b, h in np.ndindex(2, 2):
        seen = mask & ~forbidden[b, 0] if masked else mask
        expected, wanted = definition(q[b, 2 * h : 2 * h + 2], k[b, h], v[b, h], config, seen)
        assert np.array_equal(kept[b, 2 * h], wanted)
        assert np.array_equal(kept[b, 2 * h + 1], wanted)
        assert np.allclose(out[b, 2 * h : 2 * h + 2], expected, atol=1e-12)


def test_rows_that_are_computed_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseKConfig(select="tile", tile=32, top_k=5, min_context=0)
    q, k = torch.randn(1, 2, 150, 8), torch.randn(1, 1, 170, 8)
    whole = select(q, k, config=config, is_causal=True)
    monkeypatch.setattr("sparsek.kernels.reference._CHUNK_ELEMENTS", 1)
    assert torch.equal(select(q, k, config=config, is_causal=True).indices, whole.indices)


def test_auto_is_a_list_of_its_own_length() -> None:
    config = SparseKConfig(select="tile", min_context=0)
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1024, 4)
    # The last row sees its whole tile, and the window before that.
    assert select(q, k, config=config, is_causal=True).counts.item() == 384 + 4 + 15 + 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "block"}, "select = 'block': must be one of 'query', 'tile'"),
        ({"tile": 48}, "tile = 48: must be 32 or 64"),
        ({"tile": True}, "tile = True: must be 32 or 64"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseKConfig(**fields)
