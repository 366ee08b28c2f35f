"""`sparsek bench --requests`: what users of a server wait for, when several ask at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import SparseKConfig, budget_name
from ..engines.base import Engine, RequestTimes, check_fits
from .counts import top_k_used
from .environment import environment
from .model import Check, untimed
from .text import take_tokens
from .timing import alternate, ratio
from .usual_lists import with_usual_lists

_APART = 997  # tokens between the beginnings of two prompts, so that none is like another


@dataclass(frozen=True)
class RequestsRecord:
    """`n_requests` prompts of `n_prompt` tokens, sent at once, each continued by `n_gen` tokens.

    `first_s`: seconds to the first token; `token_s`: seconds from a token to the next, of all but the first;
    means over the requests, one for each repetition. The ratios are dense over this one, medians of paired
    repetitions with their quartiles; None for dense attention itself. Otherwise as `model.BenchRecord`.
    """

    engine: str
    model: str
    n_requests: int
    n_prompt: int
    n_gen: int
    top_k: int | str
    config: dict[str, Any] | None
    backend: str
    first_s: list[float]
    token_s: list[float]
    first_speedup: tuple[float, float, float] | None
    token_speedup: tuple[float, float, float] | None
    verified_rows: int
    max_abs_err: float | None
    operations: dict[str, int]
    environment: dict[str, Any]
    device: str
    n_devices: int
    top_k_used: int | list[int] | None
    kept_mean: float | None

    @property
    def test(self) -> str:
        return f"{self.n_requests} × pp{self.n_prompt}+tg{self.n_gen}"


@dataclass
class _Call:
    """Sends the requests, and remembers what they waited for."""

    engine: Engine
    prompts: list[list[int]]
    generated: int
    config: SparseKConfig | None
    times: list[list[RequestTimes]] = field(default_factory=list)

    def __call__(self) -> float:
        self.times.append(self.engine.requests(self.prompts, self.generated, self.config))
        return statistics.fmean(t.last for t in self.times[-1])

    def first(self) -> list[float]:
        return [statistics.fmean(t.first for t in times) for times in self.times]

    def between(self) -> list[float]:
        steps = self.generated - 1
        return [statistics.fmean((t.last - t.first) / steps for t in times) for times in self.times]


def bench_requests(
    engine: Engine,
    lengths: Sequence[int],
    configs: Sequence[SparseKConfig | None],
    *,
    requests: int,
    generated: int,
    text: str,
    repetitions: int = 3,
    usual_lists: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[RequestsRecord]:
    """A record for each length of the prompts and each configuration; None among these is dense attention.

    Raises:
        ValueError: the engine takes one request at a time; fewer than two tokens are to be generated, or more
        tokens than the model's context.
        VerificationError: an attention output is not that of the reference.
    """
    if not hasattr(engine, "requests"):
        raise ValueError(f"the engine {engine.name} takes one request at a time: --requests is for vllm")
    if generated < 2:
        raise ValueError(f"{generated} tokens to generate: a time per token needs 2 at least")
    for length in lengths:
        check_fits(length + generated, engine.context_length)
    tokens = take_tokens(engine, text, max(lengths) + _APART * requests)
    layers = engine.sparse_layers or []
    for length in lengths:
        prompts = [tokens[_APART * i :][:length] for i in range(requests)]
        asked = list(configs)
        if usual_lists:
            asked = [with_usual_lists(config, engine, prompts[0], layers) for config in configs]
        calls = [_Call(engine, prompts, generated, config) for config in asked]
        checks = untimed(engine, calls, asked, layers)
        for call in calls:
            call.times.clear()
        alternate(calls, repetitions, advance)
        dense = calls[configs.index(None)] if None in configs else None
        for call, check in zip(calls, checks, strict=True):
            yield _record(engine, call, check, dense)


def _record(engine: Engine, call: _Call, check: Check, dense: _Call | None) -> RequestsRecord:
    compared = dense is not None and call is not dense
    length = len(call.prompts[0])
    return RequestsRecord(
        engine=engine.name,
        model=engine.model,
        n_requests=len(call.prompts),
        n_prompt=length,
        n_gen=call.generated,
        top_k=budget_name(call.config),
        config=None if call.config is None else call.config.to_dict(),
        backend=engine.dense if call.config is None else "sparsek",
        first_s=call.first(),
        token_s=call.between(),
        first_speedup=ratio(dense.first(), call.first()) if dense and compared else None,
        token_speedup=ratio(dense.between(), call.between()) if dense and compared else None,
        verified_rows=check.verified.rows if check.verified else 0,
        max_abs_err=check.verified.max_abs_err if check.verified and check.verified.rows else None,
        operations=check.operations,
        environment=environment(),
        device=engine.device,
        n_devices=engine.n_devices,
        top_k_used=top_k_used(call.config, length + call.generated, engine.device),
        kept_mean=check.verified.kept if check.verified else None,
    )
