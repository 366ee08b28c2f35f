"""q and k made so that rows keep a wanted number of keys, which lie as those of a real head do.

Independent random numbers have no strong connections, and say nothing about a rule that keeps keys by their
share. In real heads (SmolLM2, 8192 tokens, layers 3 to 22, tiles of 64 queries) half of what a tile keeps is
next to another kept key, half is also kept by the tile before, three quarters are among the last 1024 keys,
and they are in 0.4 of all blocks of 64 keys. So q and k share what changes slowly: noise that is constant
over 4, 32, 256 and 2048 tokens. `tests/bench/test_planted.py` has these numbers for what is made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Final

import torch

from ..config import SparseKConfig
from ..policy import AUTO_SHARE
from ..problem import make_problem
from .inputs import DTYPES, Inputs
from .kept import mean_kept, usual_kept

_STEADY: Final = (4, 32, 256, 2048)  # tokens
# Of the energy of q and k; the first that will do, for flat heads keep more.
_STEADY_PARTS: Final = (0.6, 0.45, 0.3)
_WEAKEST: Final = 0.2  # size of the last dimension beside the first: in real heads they differ as well
_SHARE_OF_QUERIES: Final = 0.002  # with which each of them keeps as many as are usual: docs/choosing-k.md
_BY_TILES: Final = SparseKConfig(select="tile")
_CLOSE: Final = 0.01
_FACTORS: Final = [2 ** (i / 2) for i in range(-6, 3)]  # of q: with larger ones rows keep more, up to a point
_TRIALS: Final = 8


def planted_inputs(
    *,
    kept: int | None = None,
    tokens: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    config: SparseKConfig = _BY_TILES,
) -> Inputs:
    """q and k of which this device's kernel keeps about `kept` keys a row by the share of this configuration,
    or by the usual one where it has none: 0.004 where tiles choose and 0.002 where each query does; v is
    normal. Without `kept` as many as are usual, or nearly, are kept with the usual share.

    Raises:
        ValueError: rows cannot keep so many or so few keys.
    """
    config = replace(config, min_context=0, dense_layers=())
    if kept is None or not config.min_share:
        share = AUTO_SHARE if config.select == "tile" else _SHARE_OF_QUERIES
        config = replace(config, top_k="auto", min_share=share)
    wanted = usual_kept(tokens, config.select) if kept is None else kept
    nearest: dict[float, tuple[Inputs, float]] = {}
    reached: list[float] = []
    falling: list[tuple[float, float, Callable[[float], Inputs]]] = []
    for steady in _STEADY_PARTS:
        generator = torch.Generator(device).manual_seed(seed)
        rows = min(tokens, max(queries, config.tile))  # few are chosen for like those of a whole tile
        q, k = _queries_and_keys(steady, tokens, rows, heads, kv_heads, head_dim, batch, generator)
        k, v = (x.to(DTYPES[dtype]) for x in (k, _normal(generator, *k.shape)))

        def scaled(factor: float, q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> Inputs:
            return Inputs((q * factor).to(DTYPES[dtype]), k, v, "planted")

        numbers = [_kept(scaled(factor), config) for factor in _FACTORS]
        steps = list(zip(pairwise(_FACTORS), pairwise(numbers), strict=True))
        rising = [factors for factors, (a, b) in steps if a <= wanted <= b]
        falling += [(high, low, scaled) for (low, high), (a, b) in steps if b <= wanted <= a]
        if rising:
            return _named(queries, *_between(scaled, *rising[0], wanted, config))
        reached += numbers
        number, factor = min(
            zip(numbers, _FACTORS, strict=True), key=lambda reached: abs(reached[0] - wanted)
        )
        nearest[abs(number - wanted)] = scaled(factor), number
    if falling:
        low, high, of_factor = falling[0]
        return _named(queries, *_between(of_factor, low, high, wanted, config))
    if kept is None:  # contexts are short
        return _named(queries, *nearest[min(nearest)])
    raise ValueError(
        f"kept = {kept}: rows of {tokens} keys keep {min(reached):.0f} to {max(reached):.0f} on average"
    )


def _named(queries: int, x: Inputs, kept: float) -> Inputs:
    """The last of the queries, and a source that says what the rows of all keep."""
    return replace(x, q=x.q[:, :, -queries:], source=f"planted, {kept:.0f} kept")


def _queries_and_keys(
    steady: float,
    tokens: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, of which the part `steady` of the energy is what both share."""
    size = torch.linspace(1, _WEAKEST, head_dim, device=generator.device)
    size /= size.square().mean().sqrt()
    shared = torch.zeros(batch, kv_heads, tokens, head_dim, device=generator.device)
    for length in _STEADY:
        blocks = _normal(generator, batch, kv_heads, -(-tokens // length), head_dim)
        shared += blocks.repeat_interleave(length, 2)[:, :, :tokens]
    shared *= math.sqrt(steady / len(_STEADY))
    own = math.sqrt(1 - steady)
    k = (shared + own * _normal(generator, *shared.shape)) * size
    shared = shared[:, :, -queries:].repeat_interleave(-(-heads // kv_heads), 1)[:, :heads]
    return (shared + own * _normal(generator, *shared.shape)) * size, k


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _kept(x: Inputs, config: SparseKConfig) -> float:
    return mean_kept(make_problem(x.q, x.k, x.v, config=config, is_causal=True))


def _between(
    scaled: Callable[[float], Inputs], low: float, high: float, kept: int, config: SparseKConfig
) -> tuple[Inputs, float]:
    """The inputs for a factor between these two with which rows keep as many as wanted, nearly, and what they
    keep: with `low` it is less."""
    for _ in range(_TRIALS):
        factor = math.sqrt(low * high)
        inputs = scaled(factor)
        number = _kept(inputs, config)
        if abs(number - kept) <= _CLOSE * kept:
            break
        low, high = (factor, high) if number < kept else (low, factor)
    return inputs, number
