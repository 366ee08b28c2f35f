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
    """(output, kept) of one key head: q [G, Tq, D], k [Tk, D], v [Tk, Dv], mask bool [G, Tq, Tk], causality
    in it. One tile and one row at a time."""
    group, num_queries, size = q.shape
    num_keys = len(k)
    tile = config.tile
    top_k = num_keys if config.top_k == "auto" else config.top_k
    assert isinstance(top_k, int)
    least = math.log(config.min_share) if config.min_share else -math.inf
    kept = np.zeros(mask.shape, dtype=bool)
    scores = q @ k.T / math.sqrt(size)
    positions = np.arange(num_queries) + num_keys - num_queries
    for t in range(num_keys // tile + 1):
        rows = [(g, i) for g in range(group) for i in range(num_queries) if positions[i] // tile == t]
        begin = t * tile
        for g, i in rows:
            past = [j for j in range(positions[i] + 1) if mask[g, i, j]]
            if past:
                begin = min(begin, past[-1] // tile * tile)
        always = {
            j
            for j in range(num_keys)
            if j < config.sinks
            or j > begin - max(config.window, 1)
            or (config.stride and j % config.stride == 0)
        }
        best: dict[int, float] = {}
        for g, i in rows:
            seen = np.flatnonzero(mask[g, i])
            if not len(seen):
                continue
            shares = scores[g, i, seen] - np.log(np.exp(scores[g, i, seen]).sum())
            for j, share in zip(seen, shares, strict=True):
                if j not in always:
                    best[j] = max(best.get(j, -math.inf), share)
        best = {j: share for j, share in best.items() if share >= least}
        chosen = always | set(sorted(best, key=lambda j: (-best[j], j))[:top_k])
        for g, i in rows:
            kept[g, i, [j for j in chosen if mask[g, i, j]]] = True
    out = np.zeros((group, num_queries, v.shape[1]))
    for g, i in np.ndindex(group, num_queries):
        weights = [math.exp(scores[g, i, j]) for j in np.flatnonzero(kept[g, i])]
        values = [v[j] for j in np.flatnonzero(kept[g, i])]
        for start in range(0, num_keys - 63, 64) if config.tail == "centroid" else ():
            block = slice(start, start + 64)
            dropped = 64 - kept[g, i, block].sum()
            if mask[g, i, block].all() and dropped:
                weights.append(dropped * math.exp(scores[g, i, block].mean()))
                values.append(v[block].mean(0))
        if weights:
            out[g, i] = np.array(weights) @ np.array(values) / sum(weights)
    return out, kept


def given_mask(kind: str, num_queries: int, num_keys: int) -> Array | None:
    """[2, 1 or 4, Tq, Tk], True where a row may see a key, as far as causality allows."""
    key = np.arange(num_keys)
    position = (np.arange(num_queries) + num_keys - num_queries)[:, None]
    shape = (2, 1, num_queries, num_keys)
    length = np.array([num_keys, num_keys * 3 // 5])[:, None, None, None]  # of the two entries of the batch
    if kind == "none":
        return None
    if kind == "left padding":
        return np.broadcast_to(key >= num_keys - length, shape)
    if kind == "right padding":
        return np.broadcast_to(key < length, shape)
    if kind == "packed":
        starts = np.array([num_keys // 3, num_keys // 2 + 5])
        return np.broadcast_to(np.searchsorted(starts, key) == np.searchsorted(starts, position), shape)
    if kind == "sliding window":
        return np.broadcast_to(key > position - 40, shape)
    if kind == "empty rows":
        return np.broadcast_to((position % 70 > 65) & (key >= 3), shape)
    heads = 4 if kind == "by head" else 1
    forbidden = np.random.default_rng(1).random((2, heads, num_queries, num_keys)) < 0.3
    forbidden[:, :, num_queries // 2] = True  # a row that sees nothing
    return ~forbidden


MASKS = ["none", "left padding", "right padding", "packed", "sliding window", "empty rows", "gaps", "by head"]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "fields"),
    [
        (130, 130, {}),
        (1, 200, {"tile": 32}),
        (70, 333, {"tail": "none", "sinks": 0, "window": 0}),
        (97, 210, {"window": 50, "stride": 7, "tile": 32}),
        (5, 5, {"top_k": 3}),
        (130, 130, {"top_k": "auto", "min_share": 0.02}),
        (70, 333, {"top_k": "auto", "min_share": 0.1, "tile": 32, "tail": "none"}),
        (97, 210, {"top_k": 6, "min_share": 0.05, "window": 20}),
    ],
)
def test_the_reference_is_the_definition(
    num_queries: int, num_keys: int, fields: dict[str, Any], masked: str, kind: str
) -> None:
    config = SparseKConfig(**{"select": "tile", "top_k": 9, "min_context": 0, "dense_layers": (), **fields})
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 4, num_queries, 8)) * 2
    k, v = random.normal(size=(2, 2, 2, num_keys, 8))
    causal = np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
    given = given_mask(masked, num_queries, num_keys)
    seen = np.broadcast_to(causal if given is None else causal & given, (2, 4, num_queries, num_keys))

    def made(x: Array | None) -> Any:
        return x if x is None or kind == "numpy" else torch.from_numpy(x.copy())

    options: dict[str, Any] = {"config": config, "is_causal": True, "attn_mask": made(given)}
    out = np.asarray(attention(made(q), made(k), made(v), backend="reference", **options))
    kept = np.asarray(select(made(q), made(k), backend="reference", **options).to_mask())
    for b, h in np.ndindex(2, 2):
        group = slice(2 * h, 2 * h + 2)
        expected, wanted = definition(q[b, group], k[b, h], v[b, h], config, seen[b, group])
        assert np.array_equal(kept[b, group], wanted)
        assert np.allclose(out[b, group], expected, atol=1e-12)


def test_a_step_against_a_cache_that_is_not_filled_yet_has_its_window() -> None:
    """The window ends at the last token there is, not at the end of the cache."""
    config = SparseKConfig(select="tile", tile=32, top_k=5, window=7, min_context=0, dense_layers=())
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 400, 8)
    mask = torch.arange(400) < 203
    kept = select(q, k, config=config, attn_mask=mask).to_mask()
    filled = select(q, k[:, :, :203], config=config, is_causal=True).to_mask()
    assert torch.equal(kept[..., :203], filled)
    assert filled[..., 192 - 6 :].all()
    assert not kept[..., 203:].any()


def test_rows_before_the_first_key_and_without_causality() -> None:
    config = SparseKConfig(select="tile", tile=32, top_k=5, min_context=0, dense_layers=())
    q, k = torch.randn(1, 2, 150, 8), torch.randn(1, 1, 70, 8)
    counts = select(q, k, config=config, is_causal=True).counts[0, 0]
    assert counts[:80].sum() == 0
    assert counts[80] == 1
    assert (select(q, k, config=config).counts[0, 0, :80] == 70).all()


def test_rows_that_are_computed_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseKConfig(select="tile", tile=32, top_k=5, min_context=0)
    q, k = torch.randn(1, 2, 150, 8), torch.randn(1, 1, 170, 8)
    whole = select(q, k, config=config, is_causal=True)
    monkeypatch.setattr("sparsek.kernels.reference._CHUNK_ELEMENTS", 1)
    assert torch.equal(select(q, k, config=config, is_causal=True).indices, whole.indices)


@pytest.mark.parametrize(
    ("num_keys", "share", "listed"),
    [(192, 0.0, 192 - 4 - 15 - 64), (8256, 0.0, 0), (1024, 0.0005, 1024 - 4 - 15 - 64)],
)
def test_auto_is_a_list_of_its_own_length(num_keys: int, share: float, listed: int) -> None:
    """By share: each key gets as much, 0.0001 of 8256 keys, 0.001 of 1024, 0.0052 of 192."""
    config = SparseKConfig(select="tile", min_context=0, min_share=share)
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, num_keys, 4)
    # The last row sees its whole tile, and the window before that.
    assert select(q, k, config=config, is_causal=True).counts.item() == listed + 4 + 15 + 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "block"}, "select = 'block': must be one of 'auto', 'query', 'tile'"),
        ({"tile": 48}, "tile = 48: must be 32 or 64"),
        ({"min_share": -0.1}, "min_share = -0.1: must be a number from 0 to 1"),
        ({"min_share": float("nan")}, "min_share = nan: must be a number from 0 to 1"),
        ({"min_share": 10**400}, "min_share = 10{10}"),
        ({"tile": True}, "tile = True: must be 32 or 64"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseKConfig(**fields)
