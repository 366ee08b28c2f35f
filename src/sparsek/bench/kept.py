"""How many keys rows keep, where that depends on the scores."""

from __future__ import annotations

import math
from typing import Final

from .. import arrays
from ..arrays import is_torch
from ..kernels import dispatch
from ..problem import Problem

_TILES: Final = 16  # looked at
_ROWS: Final = 64  # where each chooses for itself
# Keys that are usual at 8192 tokens and the exponent with which they grow: where tiles choose, and where each
# query does, for which docs/choosing-k.md has those of SmolLM2 and Gemma 3.
_USUAL_OF_TILES: Final = 450, 0.62
_USUAL_OF_QUERIES: Final = 117, 0.14
_USUAL_TOKENS: Final = 8192


def sampled_kept(p: Problem, backend: str = "auto", *, tiles: int = _TILES) -> tuple[list[int], list[float]]:
    """Positions in their sequences of rows that are spread evenly over the queries, and the keys that rows
    there keep: means over heads and, if tiles choose, over a tile, of which `tiles` are looked at."""
    p = dispatch.settled(p, backend)
    tile = p.rule.tile or 1
    wanted = min(tiles if p.rule.tile else _ROWS, -(-p.num_queries // tile))
    positions, kept = [], []
    for i in range(wanted):
        start = p.num_queries * (2 * i + 1) // (2 * wanted)
        start = max(0, (p.first_position + start) // tile * tile - p.first_position)
        stop = min(p.num_queries, (p.first_position + start) // tile * tile + tile - p.first_position)
        part = p.rows(slice(start, stop))
        counts = dispatch.select(part, backend).counts
        positions.append(_seen(part) - 1)
        kept.append(float((counts.double() if is_torch(counts) else counts).mean()))
    return positions, kept


def _seen(p: Problem) -> int:
    """How many keys the row in the middle of these may see. A cache says it by the mask alone, for its cells
    are in no order."""
    middle = (p.num_queries - 1) // 2
    if p.mask is None:
        return min(p.num_keys, p.first_position + middle + 1) if p.is_causal else p.num_keys
    mask = p.mask[0, 0, middle]
    allowed = mask if mask.dtype == arrays.namespace(mask).bool else mask > -math.inf
    if p.is_causal:
        allowed = allowed[: p.first_position + middle + 1]
    return max(1, int(allowed.sum()))


def mean_kept(p: Problem, backend: str = "auto", *, tiles: int = _TILES) -> float:
    """Keys that a row keeps on average."""
    _, kept = sampled_kept(p, backend, tiles=tiles)
    return sum(kept) / len(kept)


def usual_kept(tokens: int, select: str = "tile") -> int:
    """Keys that rows of real models keep on average with the usual share, roughly: where tiles choose 450 of
    8192 and 2500 of 131072, where each query does 117 and 170."""
    keys, growth = _USUAL_OF_TILES if select == "tile" else _USUAL_OF_QUERIES
    usual: float = keys * (tokens / _USUAL_TOKENS) ** growth
    return min(tokens, round(usual))
