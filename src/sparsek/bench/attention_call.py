"""`sparsek bench-attention`: the attention call alone, verified first, then timed beside a baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _core
from ..config import SparseKConfig
from ..kernels import dispatch
from ..key_index import KeyIndex
from ..problem import make_problem
from ..verify import verify
from . import cuda_timing
from .baselines import BASELINES
from .cuda_timing import Call, PeakMemory
from .environment import environment
from .inputs import Inputs
from .kept import mean_kept
from .timing import alternate, ratio


@dataclass(frozen=True)
class AttentionRecord:
    """One shape and configuration. Times in milliseconds, medians; `ratio` is baseline over ours, the
    median of paired repetitions, with its quartiles. `max_abs_err` is against float64 over the kept set.
    `kept`: keys that a row keeps on average.
    `index`: the keys had been indexed before, as those of a KV cache are. `baseline`: what ran; "cudnn",
    "flash" or "fa3" where the fastest was asked for on CUDA. `timing`: "graph", replays of CUDA graphs, or
    "calls". Only on CUDA: `host_us`, microseconds of the host for one call of ours, and peaks of memory, with
    the inputs."""

    tokens: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    config: dict[str, Any]
    backend: str
    index: bool
    inputs: str
    dtype: str
    device: str
    isa: str
    n_threads: int
    ms: float
    baseline: str
    baseline_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    samples_ns: list[int]
    verified_rows: int
    max_abs_err: float
    environment: dict[str, Any]
    batch: int = 1
    min_share: float = 0.0
    kept: float | None = None
    timing: str = "calls"
    host_us: float | None = None
    peak_mib: float | None = None
    baseline_peak_mib: float | None = None


def bench_attention(
    inputs: Inputs,
    config: SparseKConfig,
    *,
    baseline: str = "fastest",
    backend: str = "auto",
    index: bool = False,
    threads: int,
    repetitions: int = 7,
    advance: Callable[[], None] = lambda: None,
) -> AttentionRecord:
    """Verify, then time ours and the baseline in alternation; with a KeyIndex that holds all keys, or none.

    Raises:
        ValueError: unknown baseline, or one that is not for this device.
        VerificationError: the result is not that of the reference.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline = {baseline!r}: must be one of {', '.join(map(repr, BASELINES))}")
    key_index = KeyIndex() if index else None
    p = make_problem(inputs.q, inputs.k, inputs.v, config=config, is_causal=True, index=key_index)
    p = dispatch.settled(p, backend)
    device = p.q.device.type

    def ours() -> torch.Tensor:
        out: torch.Tensor = dispatch.attention(p, backend)
        return out

    def one_more() -> torch.Tensor:
        """As in generation, where each step has a new token."""
        if key_index is not None:
            key_index.truncate(p.num_keys - 1)
        return ours()

    peak_mib = _peak_memory(inputs)(ours)
    check = verify(p, ours(), backend=backend)
    peak_memory = _peak_memory(inputs)
    other = BASELINES[baseline](p)
    calls: list[Call] = [ours] if other is None else [ours, other.call]
    baseline_peak_mib = peak_memory(other.call) if other else None
    timed, timing = (cuda_timing.samplers if device == "cuda" else _samplers)(calls)
    alternate(timed, 1)  # warm-up
    samples = alternate(timed, repetitions, advance)
    faster = ratio(samples[1], samples[0]) if other else (None, None, None)
    return AttentionRecord(
        tokens=p.num_keys,
        queries=p.num_queries,
        heads=p.q.shape[1],
        kv_heads=p.k.shape[1],
        head_dim=p.q.shape[3],
        top_k=p.rule.top_k,
        config=config.to_dict(),
        backend=backend,
        index=index,
        inputs=inputs.source,
        dtype=str(p.q.dtype).removeprefix("torch."),
        device=device,
        isa=_core.isa(),
        n_threads=threads,
        ms=statistics.median(samples[0]) * 1e3,
        baseline=other.name if other else baseline,
        baseline_ms=statistics.median(samples[1]) * 1e3 if other else None,
        ratio=faster[0],
        ratio_low=faster[1],
        ratio_high=faster[2],
        samples_ns=[round(s * 1e9) for s in samples[0]],
        verified_rows=check.rows,
        max_abs_err=check.max_abs_err,
        environment=environment(),
        batch=p.q.shape[0],
        min_share=p.rule.min_share,
        kept=mean_kept(p, backend),
        timing=timing,
        host_us=cuda_timing.host_us(one_more) if device == "cuda" else None,
        peak_mib=peak_mib,
        baseline_peak_mib=baseline_peak_mib,
    )


def _peak_memory(inputs: Inputs) -> Callable[[Call], float | None]:
    """See `PeakMemory`; on the CPU nothing is measured."""
    if inputs.q.device.type != "cuda":
        return lambda _: None
    return PeakMemory(inputs.q, inputs.k, inputs.v).mib


def _samplers(calls: Sequence[Call]) -> tuple[list[Callable[[], float]], str]:
    """On the CPU a sample is one call, with the clock."""

    def sampler(call: Call) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return once

    return [sampler(call) for call in calls], "calls"
