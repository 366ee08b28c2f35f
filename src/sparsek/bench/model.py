"""`sparsek bench`: speed of a whole model, dense beside Sparse-K, for prompts and for generation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..config import SparseKConfig, budget_name
from ..engines.base import Engine, attending_layers, check_fits, no_attention
from ..problem import Problem
from ..verify import Verification, VerificationError, verify
from .counts import top_k_used
from .environment import environment
from .text import take_tokens
from .timing import alternate, ratio
from .usual_lists import with_usual_lists

VERIFY_LAYERS = 4  # of the model, spread over its depth
VERIFY_ONE_IN = 128  # query rows of each, but 8 of each call at least


@dataclass(frozen=True)
class BenchRecord:
    """One row: a test with one configuration. Speeds in tokens per second, samples in nanoseconds.

    `top_k` 0 is the engine's own dense attention, which `backend` names; `speedup` is over it, the median of
    paired repetitions, with its quartiles; None where Sparse-K computes no attention of the model.
    `verified_rows` attention rows were compared with the float64 reference, per head; they keep `kept_mean`
    keys on average.
    `operations`: the attention operations of one repetition, by who computed them. `n_depth`: tokens before
    the first generated one; on a GPU repetitions go on where the one before ended, after an untimed one.
    """

    engine: str
    model: str
    n_prompt: int
    n_gen: int
    n_depth: int
    top_k: int | str
    config: dict[str, Any] | None
    backend: str
    isa: str
    n_threads: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    baseline_avg_ts: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    verified_rows: int
    max_abs_err: float | None
    operations: dict[str, int]
    environment: dict[str, Any]
    device: str = "cpu"
    n_devices: int = 1
    top_k_used: int | list[int] | None = None  # K in numbers: what "auto" meant; None by share
    kept_mean: float | None = None

    @property
    def test(self) -> str:
        """As llama-bench names it: pp512, tg32, tg32 @ d4096."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


@dataclass(frozen=True)
class Test:
    """One thing to time: a prompt (`generated` 0), or generation after `depth` tokens."""

    prompt: int
    generated: int
    depth: int

    @property
    def tokens(self) -> int:
        return self.prompt or self.generated


def tests(prompts: Sequence[int], generated: int, depths: Sequence[int]) -> list[Test]:
    """One test per prompt length, then one per depth where anything is to be generated."""
    found = [Test(n, 0, 0) for n in prompts if n]
    return found + [Test(0, generated, depth) for depth in depths if generated]


def bench(
    engine: Engine,
    planned: Sequence[Test],
    configs: Sequence[SparseKConfig | None],
    *,
    text: str,
    threads: int,
    repetitions: int = 3,
    usual_lists: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[BenchRecord]:
    """Run the tests; yields a record per test and configuration. None among `configs` is dense attention,
    the baseline of the others. `usual_lists`: see usual_lists.py, for random weights.

    Raises:
        ValueError: a test needs more tokens than the model's context.
        VerificationError: an attention output is not that of the reference.
    """
    calls_of_a_test = 2 + repetitions if engine.generation_goes_on else 1
    for test in planned:
        check_fits(test.prompt + test.depth + test.generated * calls_of_a_test, engine.context_length)
    longest = max(test.prompt + test.depth for test in planned)
    tokens = take_tokens(engine, text, longest)
    layers = attending_layers(engine) if any(configs) else []
    for test in planned:
        asked = list(configs)
        if usual_lists:
            of_test = tokens[: test.prompt or test.depth]
            asked = [with_usual_lists(config, engine, of_test, layers) for config in configs]
        calls = [_timed(engine, test, tokens, config) for config in asked]
        checks = untimed(engine, calls, asked, layers)
        samples = alternate(calls, repetitions, advance)
        if test.generated and engine.generation_goes_on:  # by now over more keys
            after = untimed(engine, calls, asked, layers)
            checks = [first.joined(last) for first, last in zip(checks, after, strict=True)]
        dense = samples[configs.index(None)] if None in configs else None
        for config, check, seconds in zip(asked, checks, samples, strict=True):
            yield _record(engine, test, config, check, seconds, dense, threads)


def why_no_ratio(records: Sequence[BenchRecord]) -> str | None:
    """Why a row with a K has no ratio, where dense ones were measured."""
    for record in records:
        if record.config is not None and record.baseline_avg_ts is not None and record.speedup is None:
            return f"no ratio, for {no_attention(record.model)}"
    return None


@dataclass(frozen=True)
class Check:
    """What an untimed call of a test showed. `verified`: None where all attention is the host's, as in dense
    rows and in a model whose attention is none of ours."""

    verified: Verification | None
    operations: dict[str, int]

    def joined(self, later: Check) -> Check:
        """With what a later call showed; operations are of one call."""
        if self.verified is None or later.verified is None:
            return self
        return Check(Verification.of_all([self.verified, later.verified]), self.operations)


def untimed(
    engine: Engine,
    calls: Sequence[Callable[[], float]],
    configs: Sequence[SparseKConfig | None],
    layers: Sequence[int],
) -> list[Check]:
    """Each call once, some rows of some of the `layers` verified. Raises VerificationError."""
    return [_checked(engine, call, config, layers) for call, config in zip(calls, configs, strict=True)]


def _checked(
    engine: Engine, call: Callable[[], float], config: SparseKConfig | None, layers: Sequence[int]
) -> Check:
    """Make the call once, untimed, and verify some rows of some of the layers that attend."""
    step = max(1, len(layers) // VERIFY_LAYERS)
    found: list[Verification] = []

    def check(_layer: int, problem: Problem, out: Any) -> None:
        found.append(verify(problem, out, rows=max(8, problem.num_queries // VERIFY_ONE_IN)))

    before = engine.operations()
    with engine.observed(check, layers[step - 1 :: step]):
        call()
    operations = {name: count - before[name] for name, count in engine.operations().items()}
    if config is None or not layers:
        return Check(None, operations)
    ours = operations.get("sparse", 1) + operations.get("dense", 0)
    if not found and ours:
        raise VerificationError("no attention of the model could be verified: is Sparse-K on in it?")
    return Check(Verification.of_all(found), operations)


def _timed(
    engine: Engine, test: Test, tokens: list[int], config: SparseKConfig | None
) -> Callable[[], float]:
    if test.prompt:
        return lambda: sum(seconds for _, seconds in engine.prompt(tokens[: test.prompt], config))
    return engine.generation(tokens[: test.depth], test.generated, config)


def _record(
    engine: Engine,
    test: Test,
    config: SparseKConfig | None,
    check: Check,
    seconds: list[float],
    dense: list[float] | None,
    threads: int,
) -> BenchRecord:
    speeds = [test.tokens / s for s in seconds]
    verified = check.verified
    compared = dense is not None and config is not None and verified is not None
    faster = ratio(dense, seconds) if compared and dense is not None else (None, None, None)
    return BenchRecord(
        engine=engine.name,
        model=engine.model,
        n_prompt=test.prompt,
        n_gen=test.generated,
        n_depth=test.depth,
        top_k=budget_name(config),
        config=None if config is None else config.to_dict(),
        backend=engine.dense if config is None else "sparsek",
        isa=_core.isa(),
        n_threads=threads,
        avg_ts=statistics.fmean(speeds),
        stddev_ts=statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        samples_ns=[round(s * 1e9) for s in seconds],
        baseline_avg_ts=None if dense is None else statistics.fmean(test.tokens / s for s in dense),
        speedup=faster[0],
        speedup_low=faster[1],
        speedup_high=faster[2],
        verified_rows=verified.rows if verified else 0,
        max_abs_err=verified.max_abs_err if verified and verified.rows else None,
        operations=check.operations,
        environment=environment(),
        device=engine.device,
        n_devices=engine.n_devices,
        top_k_used=top_k_used(config, test.prompt + test.depth + test.generated, engine.device),
        kept_mean=verified.kept if verified else None,
    )
