"""What `sparsek report` counts and, where no record of it is given, measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from ..bench.counts import scores_used
from ..bench.model import bench, tests
from ..config import SparseKConfig
from ..engines.base import Engine
from ..policy import by_share, on_device
from ..report.series import Costs, rule_words
from .kept_keys import KeptObserver
from .quality import Windows, evaluate

_SHORTEST: Final = 128
LONGEST: Final = 32768  # tokens that the pictures of cost go to


def costs(
    config: SparseKConfig,
    num_layers: int,
    num_heads: int,
    context_length: int,
    kept: KeptObserver | None = None,
) -> Costs:
    """Scores that enter the softmax, for prompts of powers of two up to the model's context. Those of one
    head are of a sparse layer; where K is given per layer, a mean over them.

    Args:
        kept: where that depends on the scores, what rows of `context_length` tokens keep.
    """
    longest = min(context_length, LONGEST)
    lengths = [n for n in (2**i for i in range(32)) if _SHORTEST <= n < longest] + [longest]
    full = [n * (n + 1) // 2 for n in lengths]
    if kept is None:
        one = replace(config, dense_layers=())
        layers = [scores_used(one, n, num_layers, 1)[0] // num_layers for n in lengths]
        models = [scores_used(config, n, num_layers, num_heads)[0] for n in lengths]
    else:
        layers, models = full.copy(), [n * num_layers * num_heads for n in full]
        for i, n in enumerate(lengths):
            if n >= config.min_context and kept.layers:
                layers[i] = round(statistics.fmean(kept.scores(layer, n) for layer in kept.layers))
                models[i] = round(num_heads * sum(kept.scores(layer, n) for layer in range(num_layers)))
    return Costs(
        lengths=tuple(lengths),
        layer_dense=tuple(full),
        layer_sparse=tuple(layers),
        model_dense=tuple(n * num_layers * num_heads for n in full),
        model_sparse=tuple(models),
        rule=rule_words(config),
        min_context=config.min_context,
        num_layers=num_layers,
        num_heads=num_heads,
    )


def mean_keys(record: dict[str, Any]) -> float:
    """Keys that a query attends to in an `eval` record: a mean over rows and all layers, dense ones too, as
    `tune` counts them."""
    context, layers = record["context"], len(record["mass"])
    config = SparseKConfig.from_dict(record["config"])
    config = on_device(config, record.get("device", "cpu"))
    if config.top_k == "auto" or by_share(config):  # goes by the row's place, or by its scores
        dense = (context + 1) / 2
        return statistics.fmean(dense if keys is None else keys for keys in record["kept"])
    if record.get("top_k_used") is not None:
        config = replace(config, top_k=record["top_k_used"])
    kept, _ = scores_used(config, context, layers, 1)
    return float(kept / (context * layers))


def speed(
    engine: Engine,
    configs: Sequence[SparseKConfig],
    lengths: Sequence[int],
    context: int,
    *,
    text: str,
    threads: int,
    repetitions: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """`bench` records of prompts of `lengths` tokens: dense beside the first configuration and, at the
    length that quality is measured at, beside all of them.

    Raises:
        ValueError: a length is more than the model's context.
    """
    found: list[dict[str, Any]] = []
    for planned in tests(lengths, 0, []):
        beside = configs if planned.prompt == context else configs[:1]
        records = bench(
            engine,
            [planned],
            [None, *beside],
            text=text,
            threads=threads,
            repetitions=repetitions,
            advance=advance,
        )
        found += map(asdict, records)
    return found


def runs(configs: Sequence[SparseKConfig], lengths: Sequence[int], context: int, repetitions: int) -> int:
    """How often `speed` calls `advance`."""
    return repetitions * sum(1 + (len(configs) if n == context else 1) for n in lengths)


def quality(
    engine: Engine,
    configs: Sequence[SparseKConfig],
    tokens: list[int],
    context: int,
    *,
    text_name: str,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """`eval` records of the text's first window, with `min_context` 0 so that K is used whatever the context.

    Raises:
        ValueError: as `Windows.check`.
    """
    used = [replace(config, min_context=0) for config in configs]
    found = evaluate(engine, used, Windows(tokens, context), text_name=text_name, advance=advance)
    return [asdict(record) for record in found]
