"""The few calls on which NumPy and PyTorch differ, so that the reference is written once for both.

Everything else the reference uses has the same name and keywords in both libraries. PyTorch is never
imported here: an array that is a tensor proves that it is loaded already.
"""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor
Module = Any  # the numpy or the torch module


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def on_gpu(x: Array) -> bool:
    """Whether `x` is a tensor on a CUDA device."""
    return is_torch(x) and bool(x.is_cuda)


def wants_gradient(*tensors: Array | None) -> bool:
    """Whether autograd would follow what is done with these torch tensors, backward or forward."""
    wanted = any(x is not None and x.requires_grad for x in tensors)
    return (wanted and bool(sys.modules["torch"].is_grad_enabled())) or has_tangent(*tensors)


def has_tangent(*tensors: Array | None) -> bool:
    """Whether one of these torch tensors is dual, as forward-mode differentiation has it."""
    forward = sys.modules["torch"].autograd.forward_ad
    if forward._current_level < 0:
        return False
    return any(x is not None and forward.unpack_dual(x).tangent is not None for x in tensors)


def has_data(x: Array) -> bool:
    """Whether this torch tensor has numbers in memory: not one of those with which PyTorch only looks at what
    a function does (fake, functional, within torch.func.vmap)."""
    torch = sys.modules["torch"]
    own = type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return (
        own and not torch._C._functorch.is_functorch_wrapped_tensor(x) and not torch._is_functional_tensor(x)
    )


def is_recorded(*tensors: Array | None) -> bool:
    """Whether PyTorch records what is done with these torch tensors (torch.compile, export, torch.jit.trace,
    make_fx), or they have no data."""
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    return any(x is not None and not has_data(x) for x in tensors)


def namespace(x: Array) -> Module:
    """The module whose functions work on `x`."""
    return sys.modules["torch"] if is_torch(x) else np


def arange(n: int, like: Array) -> Array:
    """0 .. n-1 as int64, on the device of `like`."""
    if is_torch(like):
        return namespace(like).arange(n, device=like.device)
    return np.arange(n)


def empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    if is_torch(like):
        return namespace(like).empty(shape, dtype=dtype, device=like.device)
    return np.empty(shape, dtype=dtype)


def full(shape: tuple[int, ...], value: float, dtype: Any, like: Array) -> Array:
    if is_torch(like):
        return namespace(like).full(shape, value, dtype=dtype, device=like.device)
    return np.full(shape, value, dtype=dtype)


def cast(x: Array, dtype: Any) -> Array:
    if is_torch(x):
        return x.to(dtype)
    return x.astype(dtype, copy=False)


def narrow(x: Array, dtype: Any) -> Array:
    """`cast`, but finite numbers stay finite; -inf stays -inf."""
    xp = namespace(x)
    if xp.finfo(x.dtype).max > xp.finfo(dtype).max:
        limit = float(xp.finfo(dtype).max)
        x = xp.where(x == -xp.inf, x, xp.clip(x, min=-limit, max=limit))
    return cast(x, dtype)


def compute_dtype(x: Array) -> Any:
    """The dtype to compute in: float64 stays, everything smaller is widened to float32."""
    xp = namespace(x)
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def kth_largest(x: Array, k: int) -> Array:
    """The k-th largest value along the last axis, that axis kept with length 1; 1 <= k <= length."""
    if is_torch(x):
        return x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    n = x.shape[-1]
    return np.partition(x, n - k, axis=-1)[..., n - k, None]


def maximum(parts: list[Array]) -> Array:
    """Elementwise, over arrays of one shape."""
    return reduce(namespace(parts[0]).maximum, parts)


def nonzero(x: Array) -> tuple[Array, ...]:
    """Indices of true elements in row-major order, one array per axis."""
    return tuple(x.nonzero(as_tuple=True) if is_torch(x) else x.nonzero())
