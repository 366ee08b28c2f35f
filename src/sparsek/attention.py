"""The public functions: attention(), topk_mask() and select(), on torch tensors and NumPy arrays.

Shapes throughout: q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]; query head h reads key/value head
h // (H / Hkv). Any floating dtype, any strides, any device.
"""

from __future__ import annotations

from . import arrays
from .arrays import Array
from .config import SparseKConfig
from .kernels import dispatch
from .key_index import KeyIndex
from .problem import NO_VALUES, make_problem, with_plain_mask
from .selection import Selection


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    config: SparseKConfig,
    attn_mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    layer: int | None = None,
    index: KeyIndex | None = None,
) -> Array:
    """Attention in which each query keeps its strongest keys.

    Args:
        attn_mask: what a row may see, broadcastable to [B, H, Tq, Tk]: bool (True = allowed) or floating
            (added to the scores; -inf forbids). On the CPU a mask of 0 and numbers below -9000 is known to
            forbid by them; other numbers are slow, for the compiled kernel does not take them.
        is_causal: the queries are the last Tq of the Tk positions, and see no later one. Can be combined
            with a mask.
        scale: factor of q.k; 1/sqrt(D) when None.
        softcap: scores become softcap * tanh(score / softcap), before the mask is added.
        backend: "auto" or the name of a kernel (`sparsek info` lists them).
        layer: the number of the layer, for a `config` that differs by layer.
        index: of k and v; makes few queries over many keys fast. See `KeyIndex`.

    Returns:
        [B, H, Tq, Dv] in the dtype of q. Rows with no allowed key are zero.

    Raises:
        TypeError, ValueError: see `make_problem`; the message quotes what was given.
    """
    problem = make_problem(
        q,
        k,
        v,
        config=config,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        layer=layer,
        index=index,
    )
    if _is_recorded(q, k, v, attn_mask):
        from .operation import attend  # which needs torch

        options = is_causal, scale, softcap, backend, layer
        return attend(q, k, v, attn_mask, config.to_json(), *options)
    return dispatch.attention(with_plain_mask(problem), backend)


def _is_recorded(*tensors: Array | None) -> bool:
    """Whether it must be an operation for PyTorch to see. Where autograd follows, the reference is one of
    PyTorch's own operations."""
    if not arrays.is_torch(tensors[0]):
        return False
    return arrays.is_recorded(*tensors) and not arrays.wants_gradient(*tensors)


def select(
    q: Array,
    k: Array,
    *,
    config: SparseKConfig,
    attn_mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    layer: int | None = None,
) -> Selection:
    """The keys that `attention` with the same arguments keeps. Same arguments and errors."""
    _check_not_recorded("select", q, k, attn_mask)
    problem = make_problem(
        q,
        k,
        NO_VALUES,
        config=config,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        layer=layer,
    )
    return dispatch.select(problem, backend)


def _check_not_recorded(name: str, *tensors: Array | None) -> None:
    """Raises TypeError: what is kept depends on values, and a record of one run would be of its own keys."""
    if arrays.is_torch(tensors[0]) and arrays.is_recorded(*tensors):
        kind = type(tensors[0]).__name__
        raise TypeError(
            f"{name}() is called where PyTorch records it (compile, trace, vmap) or with a {kind} that has "
            "no data: attention() can be recorded"
        )


def topk_mask(
    q: Array,
    k: Array,
    *,
    config: SparseKConfig,
    attn_mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    layer: int | None = None,
) -> Array:
    """The additive mask of the kept set, for any attention that takes a mask.

    [B, H, Tq, Tk] in the dtype of q: -inf where a key is dropped or forbidden, elsewhere 0 or, where
    `attn_mask` is floating, its value. Use it without `is_causal`: the causal rule is in it already. This is
    Tq x Tk memory, and the centroid tail cannot be expressed by it.
    """
    _check_not_recorded("topk_mask", q, k, attn_mask)
    problem = make_problem(
        q,
        k,
        NO_VALUES,
        config=config,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        layer=layer,
    )
    kept = dispatch.select(problem).to_mask()
    xp = arrays.namespace(q)
    bias = arrays.full((), 0, q.dtype, q)
    if problem.mask is not None and problem.mask.dtype != xp.bool:
        bias = arrays.narrow(problem.mask, q.dtype)
    return xp.where(kept, bias, arrays.full((), float("-inf"), q.dtype, q))
