"""Which versions of vLLM, and which layouts of its cache, Sparse-K can use: the only list of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Layout:
    """How a layer's cache on CUDA is indexed, however its axes may be ordered in memory.

    Attributes:
        shape: in words.
        is_packed: whether the channels of a token's key and of its value are beside each other.
        versions: of vLLM that have it and that were tried.
    """

    shape: str
    is_packed: bool
    versions: tuple[str, ...]

    def fits(self, shape: Sequence[int], num_kv_heads: int, head_size: int) -> bool:
        """Whether a cache of this shape has this layout."""
        if self.is_packed:
            return len(shape) == 4 and (shape[1], shape[3]) == (num_kv_heads, 2 * head_size)
        return len(shape) == 5 and (shape[1], *shape[3:]) == (2, num_kv_heads, head_size)


LAYOUTS: Final = (
    Layout("[blocks, 2, block, heads, channels]", False, ("0.23", "0.25")),
    Layout("[blocks, heads, block, 2 * channels]", True, ("0.27", "0.32", "0.33")),
)
# On the CPU the layout is learned: see vllm_cpu_cache.py.
VERSIONS: Final = {
    "cuda": tuple(version for layout in LAYOUTS for version in layout.versions),
    "cpu": ("0.32",),
}


def layout_of(shape: Sequence[int], num_kv_heads: int, head_size: int) -> Layout | None:
    """Of a cache of this shape; None where it is none that we can read."""
    return next((x for x in LAYOUTS if x.fits(shape, num_kv_heads, head_size)), None)


def expected_layout(backend: Any, num_kv_heads: int, head_size: int) -> Layout | None:
    """That the host's backend will ask for; None where it is none that we can read, or does not tell.

    Args:
        backend: vLLM's AttentionBackend class.
    """
    blocks, block = 7, 16  # neither is 2, which is another axis
    if hasattr(backend, "get_kv_cache_shape"):
        shape = backend.get_kv_cache_shape(blocks, block, num_kv_heads, head_size)
    elif hasattr(backend, "supported_kv_cache_layouts"):
        # Since 0.32 the shape is one for all backends, and they name the orders in memory that they read.
        shape = (blocks, num_kv_heads, block, 2 * head_size)
    else:
        return None
    return layout_of(shape, num_kv_heads, head_size)


def unreadable(shape: Sequence[int] | None, device: str) -> str:
    """In words, that a cache is none that we can read.

    Args:
        shape: None where it is not known.
    """
    which = "" if shape is None else f", {list(shape)},"
    return f"its cache{which} is of a layout that Sparse-K does not know. It works with {tried(device)}"


def was_tried(version: str, device: str) -> bool:
    """Whether this version of vLLM, as "0.33.0", is one that Sparse-K was tried with on "cuda" or "cpu"."""
    found = re.match(r"\d+\.\d+", version)
    return found is not None and found.group() in VERSIONS[device]


def tried(device: str) -> str:
    """The versions that work, in words."""
    return f"vLLM {', '.join(VERSIONS[device])} on {'CUDA' if device == 'cuda' else 'the CPU'}"
