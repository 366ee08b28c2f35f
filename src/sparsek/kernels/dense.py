"""Dense attention for the rules that keep everything: PyTorch's own scaled_dot_product_attention.

The compiled kernel does the same faster in most cases; here the others run, and those that it does not take.
"""

from __future__ import annotations

import sys
from typing import Any

from .. import _core, arrays
from ..arrays import Array
from ..problem import Problem
from . import cpu, reference

TAKES = "rules that keep everything, where PyTorch's own attention is the fastest"

_FEW_QUERIES = 32  # measured: below this, and with a key head for each query head, PyTorch is faster
_FLASH = (8, 0)  # compute capability
_MASK_ELEMENTS = 1 << 24  # of an explicit mask made at once


def why_not(p: Problem) -> str | None:
    """Why this kernel cannot do the call, or None when it can."""
    if not arrays.is_torch(p.q):
        return "the inputs are NumPy arrays"
    if not p.keeps_all:
        return "the rule drops keys"
    if p.softcap is not None:
        return "softcap is given"
    if arrays.has_tangent(p.q, p.k, p.v, p.mask):
        return "PyTorch's kernels have no forward-mode derivative"
    if p.num_keys == 0:
        return "there are no keys"
    few_rows = p.num_queries <= _FEW_QUERIES and p.q.shape[1] == p.k.shape[1]
    if not few_rows and _core.isa() != "portable" and cpu.why_not(p) is None:
        return "the compiled kernel is faster"
    return None


def attention(p: Problem) -> Array:
    """Dense attention: [B, H, Tq, Dv]; rows with no allowed key are zero."""
    out = _attention(p)
    if p.q.device.type == "cpu" and (p.mask is not None or p.is_causal) and out.isnan().any():
        return reference.attention(p)  # it may come from what a row does not see: zero times NaN
    return out


def _attention(p: Problem) -> Array:
    torch = sys.modules["torch"]
    assert p.v is not None
    num_queries, num_keys = p.num_queries, p.num_keys
    square = num_queries == num_keys and p.first_position == 0
    last_row = num_queries == 1 and p.first_position == num_keys - 1  # sees everything
    if p.mask is None and (square or last_row or not p.is_causal):
        is_causal = p.is_causal and square and not last_row
        if has_gpu_kernels(p.q, p.v):
            return on_gpu(p.q, p.k, p.v, p.scale, is_causal=is_causal)
        return _sdpa(p, p.q, None, is_causal)
    if p.mask is None and p.first_position == num_keys - num_queries >= 0 and has_gpu_kernels(p.q, p.v):
        from torch.nn.attention.bias import causal_lower_right

        return on_gpu(p.q, p.k, p.v, p.scale, mask=causal_lower_right(num_queries, num_keys))
    if p.mask is not None and not p.is_causal:
        return _sdpa(p, p.q, p.mask, False)
    # Causal but not square, or causal with a mask: SDPA needs both as one mask, made some rows at a time.
    out = arrays.empty((*p.q.shape[:3], p.v.shape[3]), p.q.dtype, p.q)
    rows_of_mask = 1 if p.mask is None else p.mask.shape[0] * p.mask.shape[1]
    step = max(1, _MASK_ELEMENTS // max(1, rows_of_mask * num_keys))
    key = torch.arange(num_keys, device=p.q.device)
    for start in range(0, num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        position = torch.arange(rows.start, rows.stop, device=p.q.device) + p.first_position
        mask = (key <= position[:, None])[None, None]
        if p.mask is not None:
            given = p.mask[:, :, rows]
            mask = mask & given if given.dtype == torch.bool else given.masked_fill(~mask, -torch.inf)
        out[:, :, rows] = _sdpa(p, p.q[:, :, rows], mask, False)
    return out


def has_gpu_kernels(q: Array, v: Array) -> bool:
    """Whether PyTorch has flash attention for the call, which takes groups of heads as they are."""
    if not (arrays.on_gpu(q) and q.dtype.itemsize == 2 and q.shape[3] == v.shape[3] <= 256):
        return False
    capability: tuple[int, int] = sys.modules["torch"].cuda.get_device_capability(q.device)
    return capability >= _FLASH


def on_gpu(q: Array, k: Array, v: Array, scale: float, *, is_causal: bool = False, mask: Any = None) -> Array:
    """Attention on a GPU that `has_gpu_kernels`: by the kernel that PyTorch prefers, but for steps."""
    if q.shape[2] == 1 and mask is None:
        return step(q, k, v, scale)
    return _grouped(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


def step(q: Array, k: Array, v: Array, scale: float) -> Array:
    """One row [B, H, 1, D] of attention to all keys on a GPU that `has_gpu_kernels`. By flash attention where
    the caller has not switched it off: cuDNN, which some versions of PyTorch prefer, makes a plan for every
    new number of keys, for some 40 ms of the host."""
    torch = sys.modules["torch"]
    fits = q.is_cuda and q.numel() > 0 and q.shape[3] % 8 == 0
    if fits and q.stride(3) == k.stride(3) == v.stride(3) == 1 and torch.backends.cuda.flash_sdp_enabled():
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: Array = flash(q, k, v, 0.0, False, False, scale=scale)[0]
        return out
    return _grouped(q, k, v, scale=scale)


def _grouped(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """PyTorch's attention by a kernel that takes groups of heads as they are."""
    sdpa = sys.modules["torch"].nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def _sdpa(p: Problem, q: Array, mask: Array | None, is_causal: bool) -> Array:
    torch = sys.modules["torch"]
    assert p.v is not None
    group = q.shape[1] // p.k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (p.k, p.v))
    if mask is not None and mask.dtype != torch.bool:
        mask = arrays.narrow(mask, arrays.compute_dtype(q))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=p.scale
    )
    if mask is None:
        return out
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    return out.masked_fill(~allowed.any(-1, keepdim=True), 0)
