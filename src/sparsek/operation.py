"""attention() as one operation of PyTorch: for those who look at a function and do not run it, or run it
again later (torch.compile and export, torch.jit.trace, make_fx, functionalize, vmap, fake tensors)."""

from __future__ import annotations

from typing import Any

import torch

from .config import SparseKConfig
from .kernels import dispatch
from .problem import make_problem, with_plain_mask


@torch.library.custom_op("sparsek::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    config: str,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    backend: str,
    layer: int | None,
) -> torch.Tensor:
    """`sparsek.attention` with the `config` as JSON. All that depends on values happens inside."""
    problem = make_problem(
        q,
        k,
        v,
        config=SparseKConfig.from_json(config),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        layer=layer,
    )
    out: torch.Tensor = dispatch.attention(with_plain_mask(problem), backend)
    return out.contiguous()


@attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: ARG001
    return q.new_empty((*q.shape[:3], v.shape[-1]))


@attend.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, int]:
    """What vmap runs over becomes a part of the batch."""
    count = info.batch_size

    def first(x: torch.Tensor, axis: int | None) -> torch.Tensor:
        return x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)

    q, k, v = (first(x, axis).flatten(0, 1) for x, axis in zip((q, k, v), in_dims[:3], strict=True))
    if mask is not None:
        mask = first(mask, in_dims[3])
        mask = mask.reshape(count, *(1,) * (5 - mask.ndim), *mask.shape[1:])
        mask = mask.expand(count, q.shape[0] // count, *mask.shape[2:]).flatten(0, 1)
    return attend(q, k, v, mask, *rest).unflatten(0, (count, -1)), 0


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError(
        "a recorded sparsek.attention (compiled, traced or within vmap) has no gradient: train without, or "
        "with PyTorch's own attention"
    )


attend.register_autograd(_no_gradient)
