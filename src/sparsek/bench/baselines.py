"""What `sparsek bench-attention` times Sparse-K beside."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import dispatch
from ..problem import Problem
from . import cuda_timing
from .cuda_timing import Call
from .kept import mean_kept
from .timing import alternate

_FLEX_BLOCK: Final = 128  # FlexAttention's own
_HOPPER: Final = 9  # compute capability, which flash attention 3 is written for


@dataclass(frozen=True)
class Baseline:
    """`call` is what is timed; `name` says what runs: "cudnn", "flash" or "fa3" for the fastest."""

    name: str
    call: Call


def _fastest(p: Problem) -> Baseline:
    """The fastest dense attention that is here: PyTorch's and, on CUDA, flash attention 3."""
    return _fastest_of(p, _fused(p) | _flash_3(p))


def _sdpa(p: Problem) -> Baseline:
    """PyTorch's dense attention in its fastest form."""
    return _fastest_of(p, _fused(p))


def _fa3(p: Problem) -> Baseline:
    """Flash attention 3."""
    calls = _flash_3(p)
    if not calls:
        raise ValueError(
            "baseline = 'fa3': needs a GPU like the H100, and flash attention 3, which comes with vLLM and "
            "with flash-attn's package flash_attn_interface"
        )
    return Baseline("fa3", calls["fa3"])


def _fastest_of(p: Problem, calls: dict[str, Call]) -> Baseline:
    fused = {name: call for name, call in calls.items() if _is_taken(call)}
    if not fused:
        return Baseline("sdpa", _default(p))
    timed, _ = cuda_timing.samplers(list(fused.values()))
    seconds = dict(zip(fused, map(statistics.median, alternate(timed, 3)), strict=True))
    fastest = min(seconds, key=lambda name: seconds[name])
    return Baseline(fastest, fused[fastest])


def _flash_3(p: Problem) -> dict[str, Call]:
    """Flash attention 3 on q, k and v [B, T, H, D], with whatever strides; {} where it is not to be had."""
    if p.q.device.type != "cuda" or torch.cuda.get_device_capability(p.q.device)[0] != _HOPPER:
        return {}
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, _values(p)))
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func

        return {"fa3": lambda: flash_attn_func(q, k, v, softmax_scale=p.scale, causal=True)}
    with contextlib.suppress(ImportError):
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        def ends(length: int) -> torch.Tensor:
            return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * length

        rows: dict[str, Any] = {"cu_seqlens_q": ends(q.shape[1]), "max_seqlen_q": q.shape[1]}
        keys = {"cu_seqlens_k": ends(k.shape[1]), "max_seqlen_k": k.shape[1]}
        packed = [x.flatten(0, 1) for x in (q, k, v)]  # copies where there are several sequences
        how: dict[str, Any] = {"softmax_scale": p.scale, "causal": True, "fa_version": 3}
        return {"fa3": lambda: flash_attn_varlen_func(*packed, **rows, **keys, **how)}
    return {}


def _fused(p: Problem) -> dict[str, Call]:
    """PyTorch's fast kernels on CUDA, called by name, with K and V as they are."""
    if p.q.device.type != "cuda":
        return {}
    from torch.nn.attention.bias import causal_lower_right

    v = _values(p)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    how: dict[str, Any] = {"scale": p.scale, "enable_gqa": True}
    if p.num_queries == p.num_keys:
        how["is_causal"] = True
    elif p.num_queries > 1:
        how["attn_mask"] = causal_lower_right(p.num_queries, p.num_keys)
        del backends["cudnn"]  # would need the mask in memory

    def under(backend: SDPBackend) -> Call:
        def once() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(p.q, p.k, v, **how)

        return once

    return {name: under(backend) for name, backend in backends.items()}


def _is_taken(call: Call) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why it is not
        try:
            call()
        except RuntimeError:
            return False
    return True


def _default(p: Problem) -> Call:
    """As PyTorch chooses: for one query `enable_gqa`, as Transformers calls it; else with K and V repeated
    for the heads of a group beforehand, untimed."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if p.num_queries == 1:
        v = _values(p)
        return lambda: sdpa(p.q, p.k, v, scale=p.scale, enable_gqa=True)
    k, v = _repeated(p)
    square = p.num_queries == p.num_keys
    mask = None if square else _causal_mask(p)
    return lambda: sdpa(p.q, k, v, attn_mask=mask, is_causal=square, scale=p.scale)


def _dense(p: Problem) -> Baseline:
    """Our own dense attention."""
    dense = replace(p, rule=p.rule.dense(p.num_keys))
    return Baseline("dense", lambda: dispatch.attention(dense))


def _mask(p: Problem) -> Baseline:
    """The method as it is usually written: all scores, top-K, a -inf mask, and dense attention under it. By
    share K is as many keys as rows keep."""
    k, v = _repeated(p)
    causal = _causal_mask(p)
    count = min(p.rule.top_k, p.num_keys) if not p.rule.min_share else math.ceil(mean_kept(p))

    def once() -> torch.Tensor:
        scores = (p.q @ k.transpose(-1, -2) * p.scale).masked_fill(~causal, -torch.inf)
        best = scores.topk(count, dim=-1).indices
        mask = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0).masked_fill(~causal, -torch.inf)
        return torch.nn.functional.scaled_dot_product_attention(p.q, k, v, attn_mask=mask, scale=p.scale)

    return Baseline("topk-mask", once)


def _flex(p: Problem) -> Baseline:
    """FlexAttention over as many keys as Sparse-K keeps, in blocks that are given: choosing them is free."""
    if p.q.device.type != "cuda":
        raise ValueError("baseline = 'flex': needs a CUDA device")
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else it compiles for any length once it has seen several
    compiled = torch.compile(flex_attention, dynamic=False)
    v, mask = _values(p), flex_mask(p, math.ceil(mean_kept(p)))
    return Baseline("flex", lambda: compiled(p.q, p.k, v, block_mask=mask, scale=p.scale, enable_gqa=True))


def flex_mask(p: Problem, kept: int) -> Any:
    """A BlockMask, the same for all heads: for each 128 queries as many blocks of 128 keys as hold what a row
    keeps on average, those with keys of these positions always and the others anywhere before."""
    from torch.nn.attention.flex_attention import BlockMask

    first, device = p.first_position, p.q.device
    row = torch.arange(0, p.num_queries, _FLEX_BLOCK, device=device)[:, None] + first
    last = (row + _FLEX_BLOCK).clamp(max=p.num_keys) - 1
    block = torch.arange(-(-p.num_keys // _FLEX_BLOCK), device=device)
    own = (block >= row // _FLEX_BLOCK) & (block <= last // _FLEX_BLOCK)  # [rows, blocks]
    past = block < row // _FLEX_BLOCK
    wanted = -(-kept // _FLEX_BLOCK) - own.sum(-1, keepdim=True)
    order = torch.rand(past.shape, device=device, generator=torch.Generator(device).manual_seed(0))
    rank = order.masked_fill(~past, 2).argsort(-1).argsort(-1)
    return BlockMask.from_kv_blocks(
        *_listed(own),
        *_listed(past & (rank < wanted)),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=lambda _b, _h, query, key: key <= query + first,
        seq_lengths=(p.num_queries, p.num_keys),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [rows, blocks]: how many are set [1, 1, rows], and which, these first [1, 1, rows, blocks]."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], which.int()[None, None]


def _repeated(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    group = p.q.shape[1] // p.k.shape[1]
    return p.k.repeat_interleave(group, 1), _values(p).repeat_interleave(group, 1)


def _values(p: Problem) -> torch.Tensor:
    assert p.v is not None
    v: torch.Tensor = p.v
    return v


def _causal_mask(p: Problem) -> torch.Tensor:
    key = torch.arange(p.num_keys, device=p.q.device)
    row = torch.arange(p.num_queries, device=p.q.device) + p.first_position
    return key <= row[:, None]


# A baseline makes, from a problem, the call to time; "none" times ours alone.
BASELINES: Final[dict[str, Callable[[Problem], Baseline | None]]] = {
    "fastest": _fastest,
    "sdpa": _sdpa,
    "fa3": _fa3,
    "dense": _dense,
    "topk-mask": _mask,
    "flex": _flex,
    "none": lambda _: None,
}
