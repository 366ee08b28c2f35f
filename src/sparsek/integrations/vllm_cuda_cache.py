"""Reads pages of vLLM's cache on CUDA.

They are gathered: the keys and values of a prompt go, as they lie in their pages, into memory of ours, and
the kernels take the strides. So a page whose tokens are first in memory is copied as one piece.
"""

from __future__ import annotations

import torch

from .vllm_versions import Layout


def gather(layout: Layout, cache: torch.Tensor, numbers: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    """Copy pages out of a layer's cache.

    Args:
        cache: as `layout` says, with its axes in any order in memory.
        numbers: of the pages, int [n].
        space: where to, contiguous, as many elements of the cache's dtype as the pages have.

    Returns:
        [2, 1, Hkv, n * block, D], keys and values, a view of `space`.
    """
    if layout.is_packed:
        pages = cache.transpose(1, 2)  # [blocks, block, Hkv, 2 D]
        _copy(pages, numbers, space)
        return split(layout, space, pages.shape[2], pages.shape[3] // 2)
    for part, into in zip(cache.unbind(1), space.view(2, -1), strict=True):
        _copy(part, numbers, into)
    return split(layout, space, cache.shape[3], cache.shape[4])


def split(layout: Layout, space: torch.Tensor, num_kv_heads: int, head_size: int) -> torch.Tensor:
    """Pages that were gathered, as keys and values [2, 1, Hkv, tokens, D]."""
    if layout.is_packed:
        return space.view(1, -1, num_kv_heads, 2, head_size).permute(3, 0, 2, 1, 4)
    return space.view(2, 1, -1, num_kv_heads, head_size).transpose(2, 3)


def _copy(pages: torch.Tensor, numbers: torch.Tensor, into: torch.Tensor) -> None:
    """Some of the pages [blocks, block, Hkv, channels], one after the other, `into` [n * a page]."""
    out = into.view(len(numbers), *pages.shape[1:])
    if _in_eights(pages):
        pages, out = pages.view(torch.int64), out.view(torch.int64)
    if pages[0].is_contiguous():
        pages, out = pages.flatten(1), out.flatten(1)
    torch.index_select(pages, 0, numbers, out=out)


def _in_eights(x: torch.Tensor) -> bool:
    """Whether it can be moved in words of eight bytes, which is faster than two at a time."""
    some = 8 // x.itemsize
    starts = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    return x.stride(-1) == 1 and all(start % some == 0 for start in starts)
