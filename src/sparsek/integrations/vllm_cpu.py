"""Sparse-K in vLLM on the CPU: the backend CPU_ATTN, where Sparse-K is asked for."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .. import _core
from .vllm import NAMES
from .vllm_backend import MOST_OF_A_PAGE, PlanningBuilder, SparseLayer
from .vllm_cpu_cache import Packing
from .vllm_versions import unreadable


def __getattr__(name: str) -> Any:
    """`Backend`: ours where Sparse-K was asked for, and the host's own for everybody else."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config().attention_config
    asked = config.backend
    # Of the kinds of layers that can be asked for apart, this one is Sparse-K's.
    asked = getattr(config, "backend_per_kind", {}).get("full_attention", asked)
    return SparseBackend if getattr(asked, "name", None) in NAMES else CPUAttentionBackend


class Builder(PlanningBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """The host's, with plans."""


class Layer(SparseLayer, CPUAttentionBackendImpl):  # type: ignore[misc]
    """The host's, with Sparse-K for prompts."""

    device, kernel = "cpu", "cpu"
    _packings: ClassVar[dict[tuple[Any, ...], Packing | None]] = {}
    _packing: Packing | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _core.use_openmp()

    def host_name(self) -> str:
        return "CPU_ATTN"

    def why_not_readable(self, layer: Any, kv_cache: torch.Tensor) -> str | None:
        key = (kv_cache.shape[1:], kv_cache.dtype, kv_cache.is_contiguous())
        if key not in self._packings:

            def write(
                key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
            ) -> None:
                self.do_kv_cache_update(layer, key, value, cache, slots)

            self._packings[key] = Packing.learn(write, kv_cache)
        self._packing = self._packings[key]
        return unreadable(kv_cache.shape, self.device) if self._packing is None else None

    def reserve(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> str | None:  # noqa: ARG002
        self.space(query.dtype, query.device, self.longest + MOST_OF_A_PAGE)
        return None

    def pages(self, kv_cache: torch.Tensor, numbers: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, ...]:
        assert self._packing is not None
        block = kv_cache.shape[2]
        count = -(-num_keys // block)
        space, unpacked = self.space(kv_cache.dtype, kv_cache.device, count * block), []
        for which in range(2):
            out = space.view(2, -1)[which].view(self.num_kv_heads, count * block, self.head_size)
            self._packing.unpack(kv_cache, numbers[:count].long(), which, out)
            unpacked.append(out[None, :, :num_keys])
        return tuple(unpacked)


class SparseBackend(CPUAttentionBackend):  # type: ignore[misc]
    """The host's, with Sparse-K."""

    @staticmethod
    def get_impl_cls() -> type[Layer]:
        return Layer

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder
