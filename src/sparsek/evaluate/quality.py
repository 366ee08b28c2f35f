"""`sparsek eval`: perplexity, and distance to dense attention, over the same windows in one run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bench.environment import environment
from ..config import SparseKConfig, budget_name
from ..engines.base import Engine
from ..kernels import reference
from ..problem import Problem
from ..verify import sample

MASS_ONE_IN = 64  # rows of each head and layer on which the retained mass is measured, but 8 at least


@dataclass(frozen=True)
class EvalRecord:
    """What one configuration costs.

    Perplexities are over all predicted tokens; `kl_mean` is the mean Kullback-Leibler divergence of the
    sparse from the dense next-token distribution, in nats; `same_top` how often both put the same token
    first. `mass_mean` is the share of the dense softmax that falls on the kept keys and `kept_mean` their
    number per row; both are means over sampled rows of the layers that are not dense. `top_k` 0 without a
    configuration is dense attention itself.
    """

    engine: str
    model: str
    text: str
    context: int
    windows: int
    top_k: int | str
    config: dict[str, Any] | None
    ppl_dense: float
    ppl: float
    ppl_ratio: float
    kl_mean: float
    same_top: float
    mass_mean: float | None
    kept_mean: float | None
    environment: dict[str, Any]


@dataclass
class _Sums:
    """Running sums over tokens (loss, kl, same) and over attention rows (mass, kept)."""

    loss_dense: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    mass: float = 0.0
    kept: int = 0
    rows: int = 0

    def add(self, dense: torch.Tensor, sparse: torch.Tensor, following: torch.Tensor) -> None:
        """Add log-probabilities [rows, vocabulary] and the tokens [rows] that really followed."""
        picked = following[:, None]
        self.loss_dense -= float(dense.gather(1, picked).double().sum())
        self.loss -= float(sparse.gather(1, picked).double().sum())
        self.kl += float((dense.exp() * (dense - sparse)).sum(-1).double().sum())
        self.same += int((dense.argmax(-1) == sparse.argmax(-1)).sum())
        self.tokens += len(following)

    def observe(self, _layer: int, problem: Problem, _out: Any) -> None:
        if not problem.keeps_all:
            mass, kept, rows = retained_mass(problem)
            self.mass += mass
            self.kept += kept
            self.rows += rows


def evaluate(
    engine: Engine,
    configs: Sequence[SparseKConfig | None],
    *,
    text: str,
    text_name: str,
    context: int,
    windows: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[EvalRecord]:
    """Measure each configuration on the first `windows` windows of `context` tokens of a text.

    None among them is dense attention, which is measured once anyway. `advance` is called after each pass of
    the model: `passes(configs, windows)` times.

    Raises:
        ValueError: the text is shorter than the windows, or `context` outside 2 .. the model's context.
    """
    if not 2 <= context <= engine.context_length:
        raise ValueError(f"context = {context}: must be 2 to {engine.context_length}, the model's own")
    if windows < 1:
        raise ValueError(f"windows = {windows}: must be at least 1")
    tokens = engine.encode(text)
    if len(tokens) < context * windows:
        raise ValueError(
            f"the text has {len(tokens)} tokens, {windows} window(s) of {context} need {context * windows}: "
            "take a longer text or a smaller --context"
        )
    sums = [_Sums() for _ in configs]
    for window in range(windows):
        _evaluate_window(engine, configs, tokens[window * context : (window + 1) * context], sums, advance)
    return [
        _record(engine, config, total, text_name, context, windows)
        for config, total in zip(configs, sums, strict=True)
    ]


def passes(configs: Sequence[SparseKConfig | None], windows: int) -> int:
    """How often the model runs."""
    return windows * (1 + sum(config is not None for config in configs))


def _evaluate_window(
    engine: Engine,
    configs: Sequence[SparseKConfig | None],
    tokens: list[int],
    sums: list[_Sums],
    advance: Callable[[], None],
) -> None:
    """All passes side by side, chunk by chunk: no pass's logits are kept."""
    dense_pass = _pass(engine, tokens, None, None, advance)
    sparse_passes = [
        None if config is None else _pass(engine, tokens, config, total, advance)
        for config, total in zip(configs, sums, strict=True)
    ]
    following = torch.tensor(tokens[1:])
    for chunk in dense_pass:
        dense = chunk[: len(following)].log_softmax(-1)
        picked, following = following[: len(dense)].to(dense.device), following[len(dense) :]
        for sparse_pass, total in zip(sparse_passes, sums, strict=True):
            sparse = dense if sparse_pass is None else next(sparse_pass)[: len(dense)].log_softmax(-1)
            total.add(dense, sparse, picked)
    for sparse_pass in sparse_passes:
        if sparse_pass is not None:
            next(sparse_pass, None)  # it is at its end


def _pass(
    engine: Engine,
    tokens: list[int],
    config: SparseKConfig | None,
    total: _Sums | None,
    advance: Callable[[], None],
) -> Iterator[torch.Tensor]:
    """The logits of one pass, its attention observed."""
    chunks = engine.logits(tokens, config)
    while True:
        with contextlib.nullcontext() if total is None else engine.observed(total.observe):
            chunk = next(chunks, None)
        if chunk is None:
            break
        yield chunk
    advance()


def retained_mass(p: Problem) -> tuple[float, int, int]:
    """The share of the dense softmax that falls on the kept keys, and their number, both added up over
    sampled rows of every head; and the number of these."""
    mass, kept, count = 0.0, 0, 0
    p = _on_torch(p)
    for block in sample(p.num_queries, max(8, p.num_queries // MASS_ONE_IN)):
        for chunk in reference.chunks(p.rows(block)):
            scores = torch.where(chunk.allowed, chunk.scores, -math.inf)
            shares = torch.where(chunk.kept, scores.softmax(-1), 0.0)
            mass += float(shares.nansum())  # a row with no allowed key has no mass to retain
            kept += int(chunk.kept.sum())
            count += chunk.kept[..., 0].numel()
    return mass, kept, count


def _on_torch(p: Problem) -> Problem:
    """The problem on torch tensors."""
    if isinstance(p.q, torch.Tensor):
        return p
    q, k = torch.from_numpy(p.q), torch.from_numpy(p.k)
    return replace(p, q=q, k=k, v=None, mask=None if p.mask is None else torch.tensor(p.mask))


def _record(
    engine: Engine, config: SparseKConfig | None, total: _Sums, text: str, context: int, windows: int
) -> EvalRecord:
    dense, sparse = math.exp(total.loss_dense / total.tokens), math.exp(total.loss / total.tokens)
    return EvalRecord(
        engine=engine.name,
        model=engine.model,
        text=text,
        context=context,
        windows=windows,
        top_k=budget_name(config),
        config=None if config is None else config.to_dict(),
        ppl_dense=dense,
        ppl=sparse,
        ppl_ratio=sparse / dense,
        kl_mean=total.kl / total.tokens,
        same_top=total.same / total.tokens,
        mass_mean=total.mass / total.rows if total.rows else None,
        kept_mean=total.kept / total.rows if total.rows else None,
        environment=environment(),
    )
