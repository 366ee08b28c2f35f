"""attention_varlen(): sequences packed one after another, as FlashAttention's varlen functions have them."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .config import SparseKConfig
from .kernels import dispatch
from .problem import make_problem


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Any,
    *,
    config: SparseKConfig,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    layer: int | None = None,
) -> Array:
    """Causal attention within each of several sequences. Each is a call of `attention` of its own: its sinks,
    its tiles, and its length where the configuration goes by the context.

    Args:
        q: [tokens, H, D]. k: [tokens, Hkv, D]. v: [tokens, Hkv, Dv].
        cu_seqlens: S + 1 integers, where the sequences start and the last one ends: from 0 to the number of
            tokens, never falling. A tensor, an array or a list; it is read on the CPU.
        config, scale, softcap, backend, layer: as in `attention`.

    Returns:
        [tokens, H, Dv] in the dtype of q.

    Raises:
        TypeError, ValueError: the message quotes what was given; see also `make_problem`.
    """
    options: dict[str, Any] = {
        "config": config,
        "is_causal": True,
        "scale": scale,
        "softcap": softcap,
        "layer": layer,
    }
    q, k, v = (_heads_first(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    whole = make_problem(q, k, v, **options)
    if whole.num_queries != whole.num_keys:
        raise ValueError(f"q has {whole.num_queries} tokens and k {whole.num_keys}: must be equal")
    dispatch.check_backend(backend)
    out = arrays.empty((whole.num_queries, q.shape[1], v.shape[3]), q.dtype, q)
    for start, stop in pairwise(_bounds(cu_seqlens, whole.num_queries)):
        if start < stop:
            q_part, k_part, v_part = (x[:, :, start:stop] for x in (q, k, v))
            p = make_problem(q_part, k_part, v_part, **options)
            part = dispatch.attention(p, "auto" if p.keeps_all else backend)  # no named kernel is for dense
            out[start:stop] = arrays.namespace(part).swapaxes(part[0], 0, 1)
    return out


def _heads_first(name: str, x: Any) -> Any:
    """[tokens, heads, size] as [1, heads, tokens, size]. What is no array is left to `make_problem`."""
    if not isinstance(x, np.ndarray) and (not arrays.is_torch(x) or x.is_nested):
        return x
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}: must have 3 axes, [tokens, heads, head size]")
    return arrays.namespace(x).swapaxes(x, 0, 1)[None]


def _bounds(cu_seqlens: Any, num_tokens: int) -> list[int]:
    """`cu_seqlens`, checked."""
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"cu_seqlens = {values!r}: must be a list, an array or a tensor of integers")
    if len(values) == 0:
        raise ValueError(f"cu_seqlens = {values!r}: must start with 0")
    bounds = [_integer(i, x) for i, x in enumerate(values)]
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens[0] = {bounds[0]}: must be 0")
    for i, (before, x) in enumerate(pairwise(bounds), 1):
        if x < before:
            raise ValueError(f"cu_seqlens[{i}] = {x} after {before}: must not fall")
    if bounds[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens ends with {bounds[-1]}: must end with {num_tokens}, the number of tokens in q"
        )
    return bounds


def _integer(i: int, x: Any) -> int:
    try:
        if not isinstance(x, (bool, np.bool_)):
            return operator.index(x)
    except TypeError:
        pass
    raise TypeError(f"cu_seqlens[{i}] = {x!r}: must be an integer")
