"""Attention of one head on a short sentence, taken from the running model: what the first pictures show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ..config import KEEP_ALL, SparseKConfig
from ..engines.base import Engine
from ..kernels import reference
from ..policy import resolve
from ..problem import Problem
from .words import token_text

MOST_TOKENS: Final = 64

Matrix = npt.NDArray[Any]


@dataclass(frozen=True)
class SentenceAttention:
    """One head's attention on T tokens; row i is the query at position i.

    Attributes:
        tokens: the text of each, as it can be shown.
        scores: float64 [T, T], before the softmax; with softcap and additive mask where the model has them.
        allowed: bool [T, T], what the base mask leaves. kept: bool [T, T], what Sparse-K leaves of that.
        always: bool [T, T], those kept whatever their score is: sinks, window, stride.
        dense, sparse: float64 [T, T], the weights: softmax over the allowed and over the kept keys.
        config: the rule.
        chosen: why this layer and head were taken, as a phrase; "" where the user named both.
    """

    tokens: tuple[str, ...]
    layer: int
    head: int
    scores: Matrix
    allowed: Matrix
    kept: Matrix
    always: Matrix
    dense: Matrix
    sparse: Matrix
    config: SparseKConfig
    chosen: str

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def best(self) -> Matrix:
        """bool [T, T]: the keys kept for their score, the top-K."""
        best: Matrix = self.kept & ~self.always
        return best

    @property
    def mask(self) -> Matrix:
        """[T, T], what is added to the scores: 0 where a key is kept, -inf elsewhere."""
        return np.where(self.kept, 0.0, -np.inf)


def small_rule(config: SparseKConfig, top_k: int) -> SparseKConfig:
    """`config` scaled down to a sentence, which its windows would cover: `top_k`, one sink, a window of two.
    There is no tail, for it takes whole blocks of 64 keys."""
    return SparseKConfig(
        top_k=top_k,
        sinks=min(config.sinks, 1),
        window=min(config.window, 2),
        stride=config.stride,
        tail="none",
        dense_layers=(),
        min_context=0,
        select="query",
    )


def capture(
    engine: Engine,
    sentence: str,
    config: SparseKConfig,
    *,
    layer: int | None = None,
    head: int | None = None,
) -> SentenceAttention:
    """Run the model, with its own dense attention, over the sentence and apply the rule to one head.

    Args:
        config: the rule, as `small_rule` makes it.
        layer, head: counted from 0. Where one is None, of those left the head is taken in which the top-K
            keys have the most weight, a mean over the rows: where choosing by score matters most.

    Raises:
        ValueError: the sentence is empty or longer than 64 tokens; the model has no such layer or head, or no
            attention that can be observed there.
    """
    for name, number, count in (("layer", layer, engine.num_layers), ("head", head, engine.num_heads)):
        if number is not None and not 0 <= number < count:
            raise ValueError(f"{name} = {number}: the model has {name}s 0 to {count - 1}")
    tokens = engine.encode(sentence) if sentence.strip() else []
    if not tokens:
        raise ValueError(f"the sentence is empty: {sentence!r}")
    if len(tokens) > MOST_TOKENS:
        start = sentence if len(sentence) <= 60 else f"{sentence[:57]}..."
        raise ValueError(
            f"the sentence has {len(tokens)} tokens, at most {MOST_TOKENS} can be drawn: {start!r}"
        )
    problems = _observed(engine, tokens)
    if layer is not None and layer not in problems:
        seen = ", ".join(map(str, sorted(problems))) or "none"
        raise ValueError(f"layer = {layer}: no attention to observe there; layers with it: {seen}")
    layers = sorted(problems) if layer is None else [layer]
    found = [attention for number in layers for attention in _heads(problems[number], number, head, config)]
    if not found:
        raise ValueError("no attention of the model could be observed")
    most = max(found, key=lambda a: float(np.where(a.best, a.dense, 0.0).sum()))  # the first of equals
    of = f"of layer {layer}" if layer is not None else "of the model" if head is None else f"numbered {head}"
    return replace(
        most,
        tokens=tuple(token_text(engine.decode([token])) for token in tokens),
        chosen=""
        if layer is not None and head is not None
        else f"of those {of}, its top-K keys have the most weight on this sentence",
    )


def _observed(engine: Engine, tokens: list[int]) -> dict[int, Problem]:
    problems: dict[int, Problem] = {}
    with engine.observed(lambda layer, problem, _out: problems.update({layer: problem})):
        list(engine.prompt(tokens, KEEP_ALL))
    return problems


def _heads(problem: Problem, layer: int, head: int | None, config: SparseKConfig) -> list[SentenceAttention]:
    size = problem.num_keys
    (chunk,) = reference.chunks(replace(problem, rule=resolve(config, size, layer=layer)))
    scores, allowed, kept, always = (
        _by_head(x, chunk.scores.shape) for x in (chunk.scores, chunk.allowed, chunk.kept, chunk.always)
    )
    return [
        SentenceAttention(
            tokens=(),
            layer=layer,
            head=number,
            scores=scores[number].astype(np.float64),
            allowed=allowed[number],
            kept=kept[number],
            always=always[number],
            dense=_softmax(scores[number], allowed[number]),
            sparse=_softmax(scores[number], kept[number]),
            config=config,
            chosen="",
        )
        for number in (range(len(scores)) if head is None else [head])
    ]


def _by_head(x: Any, shape: Sequence[int]) -> Matrix:
    """[1, Hkv, G, T, T], or what broadcasts to it, to [H, T, T]."""
    whole = torch.as_tensor(x).broadcast_to(tuple(shape))[0].flatten(0, 1).cpu()
    return (whole if whole.dtype == torch.bool else whole.double()).numpy()


def _softmax(scores: Matrix, among: Matrix) -> Matrix:
    """Over each row's True elements; a row without any is zero."""
    with np.errstate(invalid="ignore"):
        masked = np.where(among, scores, -np.inf)
        peak = masked.max(-1, keepdims=True)
        weights = np.where(among, np.exp(masked - np.where(np.isfinite(peak), peak, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    shares: Matrix = weights / np.where(total == 0, 1.0, total)
    return shares


def mean_weight(attention: SentenceAttention, among: Matrix) -> float:
    """Dense weight on the True elements of `among`, a mean over the rows."""
    total = float(np.where(among, attention.dense, 0.0).sum())
    return total / attention.size if math.isfinite(total) else math.nan
