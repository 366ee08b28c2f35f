"""`sparsek eval`: perplexity, and distance to dense attention, over the same windows in one run."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import torch

from ..bench.counts import top_k_used
from ..bench.environment import environment
from ..config import SparseKConfig, budget_name
from ..engines.base import Engine, Part
from ..integrations.observers import Observer
from .attention_mass import LayerMass, MassObserver
from .journal import Journal

Where = Literal["all", "prompt", "generation"]
WHERE: Final[tuple[Where, ...]] = ("all", "prompt", "generation")

_SEGMENT: Final = 64  # tokens whose mean is one sample of the standard error: neighbours are correlated


@dataclass(frozen=True)
class EvalRecord:
    """What one configuration costs.

    Perplexities are over all predicted tokens; `kl_mean` is the mean Kullback-Leibler divergence of the
    sparse from the dense next-token distribution, in nats; `same_top` how often both put the same token
    first. Standard errors (`_se`) are those of means over segments of 64 tokens; None with one segment.
    `where` Sparse-K worked: "all" of the window, or only its "prompt" or the "generation" after that, and
    then only the last `scored` tokens of a window are predicted.

    `mass[layer][head]` is the share of the dense softmax that falls on the kept keys, `kept[layer]` the
    number of keys a row keeps, over sampled rows; None for layers that keep everything. `mass_mean` and
    `kept_mean` are their means. `top_k` 0 without a configuration is dense attention itself; `top_k_used` is
    K in numbers: what "auto" meant at the end of a window.
    """

    engine: str
    model: str
    text: str
    context: int
    windows: int
    where: str
    scored: int
    top_k: int | str
    config: dict[str, Any] | None
    ppl_dense: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_se: float | None
    kl_mean: float
    kl_se: float | None
    same_top: float
    mass_mean: float | None
    kept_mean: float | None
    mass: list[list[float] | None]
    kept: list[float | None]
    environment: dict[str, Any]
    device: str = "cpu"
    top_k_used: int | list[int] | None = None


@dataclass(frozen=True)
class Windows:
    """Which tokens are evaluated, and how.

    Args:
        tokens: of the whole text.
        context: tokens of a window. count: of windows, one after the other. first: the window to begin with.
        where: see `EvalRecord`. generated: the last tokens of a window, which count as generated, one at a
            time, unless `where` is "all".
    """

    tokens: list[int]
    context: int
    count: int = 1
    first: int = 0
    where: Where = "all"
    generated: int = 256

    def check(self, engine: Engine) -> None:
        """Raises ValueError when the text is shorter than the windows, or a number is out of range."""
        if not 2 <= self.context <= engine.context_length:
            raise ValueError(
                f"context = {self.context}: must be 2 to {engine.context_length}, the model's own"
            )
        if self.count < 1:
            raise ValueError(f"windows = {self.count}: must be at least 1")
        if self.where != "all" and not 1 <= self.generated < self.context:
            raise ValueError(
                f"generated = {self.generated}: must be 1 to {self.context - 1}, within the context"
            )
        needed = self.context * (self.first + self.count)
        if len(self.tokens) < needed:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, {self.count} window(s) of {self.context} need "
                f"{needed}: take a longer text, a smaller --context or fewer --windows"
            )

    def window(self, number: int) -> list[int]:
        start = (self.first + number) * self.context
        return self.tokens[start : start + self.context]

    @property
    def scored(self) -> int:
        """Predicted tokens of a window."""
        return self.context - 1 if self.where == "all" else self.generated

    def parts(self, window: list[int], config: SparseKConfig | None) -> list[Part]:
        if self.where == "all":
            return [Part(window, config)]
        # The last token of the prompt predicts the first generated one.
        split = self.context - self.generated - 1
        of_prompt, of_generation = (config, None) if self.where == "prompt" else (None, config)
        parts = [Part(window[:split], of_prompt, scored=0)] if split else []
        return [*parts, Part(window[split:], of_generation, step=1)]


def passes(configs: Sequence[SparseKConfig | None], windows: int) -> int:
    """How often the model runs."""
    return windows * (1 + sum(config is not None for config in configs))


def evaluate(
    engine: Engine,
    configs: Sequence[SparseKConfig | None],
    windows: Windows,
    *,
    text_name: str,
    journal: Journal | None = None,
    advance: Callable[[int], None] = lambda _: None,
    so_far: Callable[[list[EvalRecord]], None] = lambda _: None,
) -> list[EvalRecord]:
    """Measure each configuration. None among them is dense attention, which is measured once anyway.

    `advance` is called with the number of tokens whenever the model has processed some:
    `passes(configs, windows.count) * windows.context` in all. `so_far` is called after every window but the
    last, with the records of the windows until then.

    Raises:
        ValueError: as `Windows.check`.
    """
    windows.check(engine)
    journal = journal or Journal(None, {})
    results = []
    for number in range(windows.count):
        key = f"window {windows.first + number}, {windows.where}: {[c and c.to_dict() for c in configs]}"
        if journal.has(key):
            advance(passes(configs, 1) * windows.context)

        def measure(number: int = number) -> Any:
            window = windows.window(number)
            return [asdict(r) for r in _measure(engine, configs, windows, window, advance)]

        results.append([_Result(**r) for r in journal.get(key, measure)])
        done = replace(windows, count=number + 1)
        records = [
            _record(engine, config, [of_window[i] for of_window in results], done, text_name)
            for i, config in enumerate(configs)
        ]
        if done.count < windows.count:
            so_far(records)
    return records


@dataclass(frozen=True)
class _Result:
    """Of one configuration on one window. `segments`: [loss_dense, loss, kl, same, tokens], sums."""

    segments: list[list[float]]
    layers: dict[str, Any]


def _measure(
    engine: Engine,
    configs: Sequence[SparseKConfig | None],
    windows: Windows,
    window: list[int],
    advance: Callable[[int], None],
) -> list[_Result]:
    """All passes side by side, chunk by chunk: no pass's logits are kept."""
    observers = [MassObserver() for _ in configs]
    dense_pass = observed_logits(engine, windows.parts(window, None), None, advance)
    sparse_passes = [
        None if config is None else observed_logits(engine, windows.parts(window, config), observer, advance)
        for config, observer in zip(configs, observers, strict=True)
    ]
    following = torch.tensor(window[-windows.scored :])
    measured: list[list[torch.Tensor]] = [[] for _ in configs]
    for chunk in dense_pass:
        dense = chunk[: len(following)].log_softmax(-1)
        picked, following = following[: len(dense)].to(dense.device), following[len(dense) :]
        for sparse_pass, found in zip(sparse_passes, measured, strict=True):
            sparse = dense if sparse_pass is None else next(sparse_pass)[: len(dense)].log_softmax(-1)
            found.append(compare(dense, sparse, picked))
    for sparse_pass in sparse_passes:
        if sparse_pass is not None:
            next(sparse_pass, None)  # it is at its end
    return [
        _Result(
            [[*part.sum(0).tolist(), len(part)] for part in torch.split(torch.cat(found), _SEGMENT)],
            {str(layer): asdict(mass) for layer, mass in observer.layers.items()},
        )
        for found, observer in zip(measured, observers, strict=True)
    ]


def compare(dense: torch.Tensor, sparse: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """From log-probabilities [rows, vocabulary] and the tokens [rows] that really followed, of each row:
    loss_dense, loss, kl, same; [rows, 4] in float64 on the CPU."""
    picked = following[:, None]
    loss_dense, loss = (-x.gather(1, picked)[:, 0].double() for x in (dense, sparse))
    kl = (dense.exp() * (dense - sparse)).sum(-1).double()
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    return torch.stack([loss_dense, loss, kl, same], 1).cpu()


def observed_logits(
    engine: Engine, parts: list[Part], observer: Observer | None, advance: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """The logits of one pass over the parts, its attention observed."""
    total = sum(len(part.tokens) for part in parts)
    chunks, told = engine.logits(parts), 0
    while True:
        with contextlib.nullcontext() if observer is None else engine.observed(observer):
            chunk = next(chunks, None)
        if chunk is None:
            break
        advance(len(chunk))
        told += len(chunk)
        yield chunk
    advance(total - told)  # those without logits


def _record(
    engine: Engine,
    config: SparseKConfig | None,
    results: Sequence[_Result],
    windows: Windows,
    text: str,
) -> EvalRecord:
    segments = [segment for result in results for segment in result.segments]
    loss_dense, loss, kl, same, tokens = (math.fsum(column) for column in zip(*segments, strict=True))
    dense, sparse = perplexity(loss_dense / tokens), perplexity(loss / tokens)
    whole = [s for s in segments if s[4] >= _SEGMENT / 2]
    difference_se = standard_error([(s[1] - s[0]) / s[4] for s in whole])
    layers = _add([result.layers for result in results])
    mass: list[list[float] | None] = []
    kept: list[float | None] = []
    for layer in range(engine.num_layers):
        found = layers.get(layer)
        mass.append([m / found.rows for m in found.mass] if found else None)
        kept.append(found.kept / found.rows if found else None)
    return EvalRecord(
        engine=engine.name,
        model=engine.model,
        text=text,
        context=windows.context,
        windows=windows.count,
        where=windows.where,
        scored=windows.scored,
        top_k=budget_name(config),
        config=None if config is None else config.to_dict(),
        ppl_dense=dense,
        ppl=sparse,
        ppl_ratio=sparse / dense,
        ppl_ratio_se=None if difference_se is None else sparse / dense * difference_se,
        kl_mean=kl / tokens,
        kl_se=standard_error([s[2] / s[4] for s in whole]),
        same_top=same / tokens,
        mass_mean=_mean([m for heads in mass if heads for m in heads]),
        kept_mean=_mean([k for k in kept if k is not None]),
        mass=mass,
        kept=kept,
        environment=environment(),
        device=engine.device,
        top_k_used=top_k_used(config, windows.context, engine.device),
    )


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; or the ratio of two, of their difference. ValueError beyond all numbers."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise ValueError(
            f"the perplexity is e to the power of {loss:.0f}: are the weights damaged?"
        ) from None


def _add(windows: Sequence[dict[str, Any]]) -> dict[int, LayerMass]:
    totals: dict[int, LayerMass] = {}
    for window in windows:
        for layer, found in window.items():
            totals.setdefault(int(layer), LayerMass([0.0] * len(found["mass"]))).add(**found)
    return totals


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def standard_error(samples: Sequence[float]) -> float | None:
    return statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else None
