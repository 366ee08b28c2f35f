"""`sparsek bench-attention`: the attention call alone, verified first, then timed beside a baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from .. import _core
from ..config import SparseKConfig
from ..kernels import dispatch
from ..key_index import KeyIndex
from ..problem import Problem, make_problem
from ..verify import verify
from .environment import environment
from .timing import alternate, ratio

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class AttentionRecord:
    """One shape and configuration. Times in milliseconds, medians; `ratio` is baseline over ours, the
    median of paired repetitions, with its quartiles. `max_abs_err` is against float64 over the kept set.
    `index`: the keys had been indexed before, as those of a KV cache are."""

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


@dataclass(frozen=True)
class Inputs:
    """q [1, H, Tq, D], k and v [1, Hkv, Tk, D], causal, and where they come from."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    source: str


def random_inputs(
    *,
    tokens: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Standard normal q, k, v."""
    generator = torch.Generator().manual_seed(seed)

    def normal(num_heads: int, length: int) -> torch.Tensor:
        x = torch.randn(1, num_heads, length, head_dim, generator=generator)
        return x.to(device=device, dtype=DTYPES[dtype])

    return Inputs(normal(heads, queries), normal(kv_heads, tokens), normal(kv_heads, tokens), "random")


def bench_attention(
    inputs: Inputs,
    config: SparseKConfig,
    *,
    baseline: str = "sdpa",
    backend: str = "auto",
    index: bool = False,
    threads: int,
    repetitions: int = 7,
    advance: Callable[[], None] = lambda: None,
) -> AttentionRecord:
    """Verify, then time ours and the baseline in alternation; with a KeyIndex that holds all keys, or none.

    Raises:
        ValueError: unknown baseline. VerificationError: the result is not that of the reference.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline = {baseline!r}: must be one of {', '.join(map(repr, BASELINES))}")
    key_index = KeyIndex() if index else None
    p = make_problem(inputs.q, inputs.k, inputs.v, config=config, is_causal=True, index=key_index)
    check = verify(p, dispatch.attention(p, backend), backend=backend)
    calls = [lambda: dispatch.attention(p, backend)]
    if other := BASELINES[baseline](p):
        calls.append(other)
    timed = [_timed(call, p.q.device.type) for call in calls]
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
        device=p.q.device.type,
        isa=_core.isa(),
        n_threads=threads,
        ms=statistics.median(samples[0]) * 1e3,
        baseline=baseline,
        baseline_ms=statistics.median(samples[1]) * 1e3 if other else None,
        ratio=faster[0],
        ratio_low=faster[1],
        ratio_high=faster[2],
        samples_ns=[round(s * 1e9) for s in samples[0]],
        verified_rows=check.rows,
        max_abs_err=check.max_abs_err,
        environment=environment(),
    )


def _timed(call: Callable[[], torch.Tensor], device: str) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return once


def _sdpa(p: Problem) -> Callable[[], torch.Tensor]:
    """PyTorch's dense attention in its fastest form: for one query `enable_gqa`, as Transformers calls it;
    else with K and V repeated for the heads of a group beforehand, untimed."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if p.num_queries == 1:
        assert p.v is not None
        values = p.v
        return lambda: sdpa(p.q, p.k, values, scale=p.scale, enable_gqa=True)
    k, v = _repeated(p)
    square = p.num_queries == p.num_keys
    mask = None if square else _causal_mask(p)
    return lambda: sdpa(p.q, k, v, attn_mask=mask, is_causal=square, scale=p.scale)


def _dense(p: Problem) -> Callable[[], torch.Tensor]:
    """Our own dense attention."""
    dense = replace(p, rule=replace(p.rule, top_k=p.num_keys))
    return lambda: dispatch.attention(dense)


def _mask(p: Problem) -> Callable[[], torch.Tensor]:
    """The method as it is usually written: all scores, top-K, a -inf mask, and dense attention under it."""
    k, v = _repeated(p)
    causal = _causal_mask(p)

    def once() -> torch.Tensor:
        scores = (p.q @ k.transpose(-1, -2) * p.scale).masked_fill(~causal, -torch.inf)
        best = scores.topk(min(p.rule.top_k, p.num_keys), dim=-1).indices
        mask = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0).masked_fill(~causal, -torch.inf)
        return torch.nn.functional.scaled_dot_product_attention(p.q, k, v, attn_mask=mask, scale=p.scale)

    return once


def _repeated(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    group = p.q.shape[1] // p.k.shape[1]
    assert p.v is not None
    return p.k.repeat_interleave(group, 1), p.v.repeat_interleave(group, 1)


def _causal_mask(p: Problem) -> torch.Tensor:
    key = torch.arange(p.num_keys, device=p.q.device)
    row = torch.arange(p.num_queries, device=p.q.device) + p.first_position
    return key <= row[:, None]


# A baseline makes, from a problem, the call to time; "none" times ours alone.
BASELINES: Final[dict[str, Callable[[Problem], Callable[[], torch.Tensor] | None]]] = {
    "sdpa": _sdpa,
    "dense": _dense,
    "topk-mask": _mask,
    "none": lambda _: None,
}
