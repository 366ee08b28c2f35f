"""Verification: the output of a kernel, on sampled rows, against the reference in float64.

No speed is printed anywhere without this having passed in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
_LEAST_MASS_OF_A_ROW: Final = 0.5
# By how much a share may be smaller than is asked for: products for tiles and for generation have few bits.
_EXCESS: Final = 4


class VerificationError(Exception):
    """A kernel's result is not that of the reference."""


@dataclass(frozen=True)
class Verification:
    """`rows` query rows of each head were compared; `max_abs_err` is the largest error of the output. `kept`:
    keys that these rows keep on average, without those that keep everything; None where all do."""

    rows: int
    max_abs_err: float
    kept: float | None = None

    @classmethod
    def of_all(cls, parts: Sequence[Verification]) -> Verification:
        """Several in one."""
        choosing = [(part.rows, part.kept) for part in parts if part.kept is not None]
        rows = sum(rows for rows, _ in choosing)
        kept = sum(rows * kept for rows, kept in choosing) / rows if rows else None
        worst = max((part.max_abs_err for part in parts), default=0.0)
        return cls(sum(part.rows for part in parts), worst, kept)


def verify(p: Problem, out: Array, *, backend: str = "auto", rows: int = 64) -> Verification:
    """Compare `out`, a kernel's result for `p`, with float64, on about `rows` rows spread over the queries.

    The kept set must be a top-K set within rounding, or have every key with `min_share`, none that is worse
    than one it leaves out, and no more than an estimate of the softmax's sum explains; a list of a tile must
    hold nearly as much of the softmax as the best list. The output is compared over the set that was kept,
    for two keys of equal score are no error.

    Raises:
        VerificationError: a dropped key is better than a kept one, too many are kept, or the output is off.
    """
    parts = []
    p = dispatch.settled(p, backend)
    for block in blocks(p, rows):
        part = p.rows(block)
        exact = _in_float64(part)
        selection = dispatch.select(part, backend)
        _verify_selection(exact, selection.to_mask())
        expected = reference.attention(exact, selection)
        error = _largest(arrays.cast(out[:, :, block], expected.dtype) - expected)
        bound = _TOLERANCE[_name(p.q.dtype)] * max(1.0, _largest(exact.v))
        if not error <= bound:  # NaN is off too
            raise VerificationError(f"output is off by {error:.3g}, allowed is {bound:.3g}, in rows {block}")
        kept = None if p.keeps_all else float(arrays.cast(selection.counts, expected.dtype).mean())
        parts.append(Verification(block.stop - block.start, error, kept))
    return Verification.of_all(parts)


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
        if n == 0:
            continue
        if bool((given & ~chunk.allowed).any()):
            raise VerificationError(f"a key that is masked is kept, in rows {chunk.rows}")
        if bool((chunk.always & ~given).any()):
            raise VerificationError(f"a dropped key is one that is always kept, in rows {chunk.rows}")
        _verify_counts(p, chunk, given)
        if p.rule.tile and not p.keeps_all:
            _verify_mass(p, chunk, given)
            continue
        dropped_wrongly = chunk.kept & ~given
        kept_wrongly = given & ~chunk.kept
        missing = xp.amax(xp.where(dropped_wrongly, chunk.scores, -math.inf), -1)
        extra = xp.amin(xp.where(kept_wrongly, chunk.scores, math.inf), -1)
        counts, expected_counts = xp.sum(given, -1), xp.sum(chunk.kept, -1)
        if p.rule.min_share:  # an estimate of the softmax's sum may keep more
            missing = xp.amax(xp.where(chunk.allowed & ~given, chunk.scores, -math.inf), -1)
            good_count = (counts >= expected_counts) | ~_certain(p, chunk, dropped_wrongly)
        else:
            good_count = counts == expected_counts
        within = missing - extra <= _eps(missing)
        if not bool((good_count & within).all()):
            raise VerificationError(f"a dropped key is better than a kept one, in rows {chunk.rows}")


def _verify_mass(p: Problem, chunk: reference.Chunk, given: Array) -> None:
    """The lists of each key head hold nearly as much of the softmax as the best; by share alone, where a list
    has all that a row wants, of each row most."""
    xp = arrays.namespace(given)
    shares = xp.exp(reference.log_share(chunk.scores, chunk.allowed))
    held, best = (xp.sum(xp.where(x, shares, 0), -1) for x in (given, chunk.kept))  # [B, Hkv, G, R]
    checks = [(_LEAST_MASS, xp.sum(held, (2, 3)), xp.sum(best, (2, 3)))]
    if p.rule.top_k >= p.num_keys:
        checks.append((_LEAST_MASS_OF_A_ROW, held, best))
    for least, part, whole in checks:
        if not bool((part >= least * whole).all()):
            worst = float((part / xp.where(whole == 0, 1, whole)).min())
            raise VerificationError(
                f"the keys chosen hold {worst:.3f} of what the best hold, in rows {chunk.rows}"
            )


def _verify_counts(p: Problem, chunk: reference.Chunk, given: Array) -> None:
    """No row or tile chooses more than `top_k` keys. By share, rows choose no more than have a part of it, of
    the estimate of the softmax's sum."""
    xp = arrays.namespace(given)
    if p.keeps_all:
        return
    chosen = _of_lists(p, chunk, given & ~chunk.always)
    longest = int(xp.sum(chosen, -1).max())
    if longest > p.rule.top_k:
        raise VerificationError(f"{longest} keys are chosen, {p.rule.top_k} at most, in rows {chunk.rows}")
    if not p.rule.min_share:
        return
    least = _estimated_total(p, chunk) + math.log(p.rule.min_share) - math.log(_EXCESS)
    enough = _of_lists(p, chunk, chunk.allowed & ~chunk.always & (chunk.scores >= least))
    found, most = (int(xp.sum(x)) for x in (chosen, enough))
    if found > most:
        raise VerificationError(
            f"{found} keys are chosen and {most} have a share of {p.rule.min_share / _EXCESS:.3g}, in rows "
            f"{chunk.rows}"
        )


def _of_lists(p: Problem, chunk: reference.Chunk, of_rows: Array) -> Array:
    """bool [..., lists, n]: `of_rows` itself, or where tiles choose what some row of a tile has."""
    if not p.rule.tile:
        return of_rows
    tiles = [of_rows[:, :, :, tile].any(3).any(2) for tile in reference.tiles(p, chunk.rows)]
    return arrays.namespace(of_rows).stack(tiles)


def _estimated_total(p: Problem, chunk: reference.Chunk) -> Array:
    """log-sum-exp of each row as kernels may estimate it, [..., 1]: of the always-kept keys, and of the means
    of blocks of the others. -inf where there are none."""
    xp = arrays.namespace(chunk.scores)
    terms = xp.where(chunk.always, chunk.scores, -math.inf)
    if terms.shape[-1] >= reference.BLOCK:
        terms = xp.concatenate((terms, reference.block_logits(p, chunk, chunk.always)), -1)
    return reference.log_total(terms, terms > -math.inf)[..., None]


def _certain(p: Problem, chunk: reference.Chunk, dropped: Array) -> Array:
    """The rows in which some dropped key has `min_share`, of the estimate too, whatever the rounding."""
    total = reference.log_total(chunk.scores, chunk.allowed)[..., None]
    least = arrays.maximum([total, _estimated_total(p, chunk)]) + math.log(p.rule.min_share)
    certain: Array = (dropped & (chunk.scores - _eps(chunk.scores) > least)).any(-1)
    return certain


def _eps(scores: Array) -> Array:
    """By how much rounding may move two such scores against each other."""
    return 2 * _SCORE_EPS * arrays.namespace(scores).where(abs(scores) > 1, abs(scores), 1.0)


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
