"""Lists of the usual length in a model with random weights.

How many keys rows keep decides how fast Sparse-K is, and by the scores of random weights that is a number
without meaning. So a share is looked for with which they keep as many as those of real models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from ..config import SparseKConfig
from ..engines.base import Engine
from ..policy import by_share, on_device
from ..problem import Problem
from .kept import mean_kept, usual_kept

_SHARES: Final[list[float]] = [0.128 / 2**i for i in range(10)]
_TILES: Final = 2  # looked at in each part of the prompt


def with_usual_lists(
    config: SparseKConfig | None, engine: Engine, tokens: list[int], layers: Sequence[int]
) -> SparseKConfig | None:
    """`config`; where its K is "auto" and that is by share, with the share by which rows of this prompt keep
    `usual_kept` keys on average, in the middle one of the `layers`, or as nearly as any share tried. What
    they keep is in the records of `bench`."""
    if config is None or config.top_k != "auto" or config.min_share or not (layers and tokens):
        return config
    shaped = on_device(replace(config, min_context=0, dense_layers=()), engine.device)
    if not by_share(shaped):
        return config
    kept, rows = [0.0] * len(_SHARES), 0

    def count(_layer: int, p: Problem, _out: Any) -> None:
        nonlocal rows
        rows += p.num_queries
        for i, share in enumerate(_SHARES):
            asked = replace(p, rule=replace(p.rule, min_share=share))
            kept[i] += mean_kept(asked, tiles=_TILES) * p.num_queries

    with engine.observed(count, [layers[len(layers) // 2]]):
        for _ in engine.prompt(tokens, replace(shaped, min_share=_SHARES[0])):
            pass
    if not rows:  # so short a prompt is left to the host
        return config
    usual = usual_kept(len(tokens), shaped.select)
    return replace(config, min_share=_share([x / rows for x in kept], usual))


def _share(kept: Sequence[float], wanted: int) -> float:
    """Where `wanted` is between the numbers `kept` with `_SHARES`, along straight lines of the logarithms."""
    points = list(zip(_SHARES, kept, strict=True))
    for (share, fewer), (lower, more) in pairwise(points):
        if fewer < wanted <= more:
            part = math.log(wanted / fewer) / math.log(more / fewer)
            return float(f"{share * math.exp(part * math.log(lower / share)):.3g}")
    share, _ = min(points, key=lambda point: abs(point[1] - wanted))
    return share
