"""Verification: the output of a kernel, on sampled rows, against the reference in float64.

No speed is printed anywhere without this having passed in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from . import arrays
from .arrays import Array
from .kernels import dispatch, reference
from .problem import Problem

_BLOCK_ROWS: Final = 8
# Largest error allowed, in units of the largest value: about 2x that of plain PyTorch in that dtype.
_TOLERANCE: Final = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# Scores are computed in float32 at least, whatever the dtype of the inputs.
_SCORE_EPS: Final = 1e-5
# Of the softmax that the best list holds, for a list of a tile. On a model's own activations (SmolLM2, 8192
# tokens, seven layers) tiles hold 0.998 of it on average and 0.95 at least.
_LEAST_MASS: Final = 0.9


class VerificationError(Exception):
    """A kernel's result is not that of the reference."""


@dataclass(frozen=True)
class Verification:
    """`rows` query rows of each head were compared; `max_abs_err` is the largest error of the output."""

    rows: int
    max_abs_err: float


def verify(p: Problem, out: Array, *, backend: str = "auto", rows: int = 64) -> Verification:
    """Compare `out`, a kernel's result for `p`, with float64, on about `rows` rows spread over the queries.

    The kept set must be a top-K set within rounding; the output is compared over the set that was kept, for
    two keys of equal score are no error.

    Raises:
        VerificationError: a dropped key is better than a kept one, or the output is off.
    """
    worst, count = 0.0, 0
    p = dispatch.settled(p, backend)
    for block in blocks(p, rows):
        part = p.rows(block)
        exact = _in_float64(part)
        selection = dispatch.select(part, backend)
        _verify_selection(exact, selection.to_mask())
        expected = reference.attention(exact, selection)
        error = _largest(arrays.cast(out[:, :, block], expected.dtype) - expected)
        bound = _TOLERANCE[_name(p.q.dtype)] * max(1.0, _largest(exact.v))
        worst = max(worst, error)
        if not error <= bound:  # NaN is off too
            raise VerificationError(f"output is off by {error:.3g}, allowed is {bound:.3g}, in rows {block}")
        count += block.stop - block.start
    return Verification(count, worst)


def blocks(p: Problem, rows: int) -> Iterator[slice]:
    """As `sample`; where tiles choose keys, blocks of whole tiles."""
    tile, first, before = p.rule.tile or 1, p.first_position, None
    for block in sample(p.num_queries, rows):
        start = max(0, (first + block.start) // tile * tile - first)
        stop = min(p.num_queries, -(-(first + block.stop) // tile) * tile - first)
        if (start, stop) != before:
            yield slice(start, stop)
        before = start, stop


def sample(num_rows: int, wanted: int) -> Iterator[slice]:
    """Blocks of up to 8 neighbouring rows, about `wanted` rows in all, evenly spread; the last row is in."""
    blocks = max(1, min(wanted, num_rows) // _BLOCK_ROWS)
    for i in range(1, blocks + 1):
        stop = num_rows * i // blocks
        yield slice(max(num_rows * (i - 1) // blocks, stop - _BLOCK_ROWS), stop)


def _verify_selection(p: Problem, kept: Array) -> None:
    """Every kept key is at least as good as the K-th best, every dropped one at most, within eps. A list of a
    tile, which is chosen with few bits, must hold nearly as much of the softmax as the best list."""
    xp = arrays.namespace(kept)
    for chunk in reference.chunks(p):
        n = chunk.kept.shape[-1]
        given = kept[:, :, chunk.rows, :n].reshape(chunk.kept.shape)
        if p.rule.tile and not p.keeps_all:
            shares = xp.exp(reference.log_share(chunk.scores, chunk.allowed))
            held, best = (float(xp.sum(xp.where(x, shares, 0))) for x in (given, chunk.kept))
            if not held >= _LEAST_MASS * best:
                raise VerificationError(
                    f"the keys chosen hold {held / best:.3f} of what the best hold, in rows {chunk.rows}"
                )
            continue
        dropped_wrongly = chunk.kept & ~given
        kept_wrongly = given & ~chunk.kept
        missing = xp.amax(xp.where(dropped_wrongly, chunk.scores, -math.inf), -1)
        extra = xp.amin(xp.where(kept_wrongly, chunk.scores, math.inf), -1)
        same_count = xp.sum(chunk.kept, -1) == xp.sum(given, -1)
        within = missing - extra <= 2 * _SCORE_EPS * xp.where(abs(missing) > 1, abs(missing), 1.0)
        if not bool((same_count & within).all()):
            raise VerificationError(f"a dropped key is better than a kept one, in rows {chunk.rows}")


def _in_float64(p: Problem) -> Problem:
    xp = arrays.namespace(p.q)
    mask = p.mask
    if mask is not None and mask.dtype != xp.bool:
        mask = arrays.cast(mask, xp.float64)
    q, k, v = (arrays.cast(x, xp.float64) for x in (p.q, p.k, p.v))
    return replace(p, q=q, k=k, v=v, mask=mask)


def _largest(x: Any) -> float:
    return float(abs(x).max()) if math.prod(x.shape) else 0.0


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
