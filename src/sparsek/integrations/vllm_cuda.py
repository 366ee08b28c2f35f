"""Sparse-K in vLLM on CUDA: the backend CUSTOM, which is flash attention with Sparse-K for long prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from ..kernels import triton_prefill
from ..policy import on_gpu, resolve
from .vllm_backend import MOST_OF_A_PAGE, PlanningBuilder, SparseLayer
from .vllm_cuda_cache import gather, split
from .vllm_versions import Layout, expected_layout, layout_of, unreadable

if not current_platform.is_cuda():
    raise ImportError(
        f"Sparse-K in vLLM is for CUDA and the CPU, and this platform is {current_platform.device_name}: "
        "serve without --attention-backend CUSTOM"
    )


class Builder(PlanningBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """The host's, with plans."""

    def detached(self, metadata: Any) -> Any:
        if metadata.scheduler_metadata is not None:
            metadata.scheduler_metadata = metadata.scheduler_metadata.clone()
        return metadata


class Layer(SparseLayer, FlashAttentionImpl):  # type: ignore[misc]
    """The host's, with Sparse-K for prompts."""

    device, kernel = "cuda", "triton_prefill"
    _reserved: ClassVar[dict[tuple[Any, ...], str | None]] = {}
    _layout: Layout | None

    def host_name(self) -> str:
        return f"FLASH_ATTN {self.vllm_flash_attn_version}"

    def why_not_usable(self) -> str | None:
        self._layout = expected_layout(FlashAttentionBackend, self.num_kv_heads, self.head_size)
        return unreadable(None, self.device) if self._layout is None else None

    def why_not_readable(self, layer: Any, kv_cache: torch.Tensor) -> str | None:  # noqa: ARG002
        found = layout_of(kv_cache.shape, self.num_kv_heads, self.head_size)
        if found is None:
            return unreadable(kv_cache.shape, self.device)
        self._layout = found
        return None

    def reserve(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> str | None:  # noqa: ARG002
        sizes = self.num_heads, self.num_kv_heads, self.head_size, self.longest
        key = (query.device, query.dtype, *sizes, self.sparsek)
        if key not in self._reserved:
            try:
                self._reserve(query, output)
                self._reserved[key] = None
            except ValueError as error:  # of the kernel, which does not do such calls
                self._reserved[key] = str(error)
        return self._reserved[key]

    def _reserve(self, query: torch.Tensor, output: torch.Tensor) -> None:
        assert self.sparsek is not None
        assert self._layout is not None
        config = replace(on_gpu(self.sparsek), dense_layers=(), min_context=0)
        space = self.space(query.dtype, query.device, self.longest + MOST_OF_A_PAGE)
        k, v = split(self._layout, space, self.num_kv_heads, self.head_size)
        budgets = config.top_k if isinstance(config.top_k, tuple) else (config.top_k,)
        for budget in sorted(set(budgets), key=str):
            of_budget = replace(config, top_k=budget)
            if resolve(of_budget, self.longest).keeps_all(self.longest):
                continue  # the host does it
            for keys, rows in triton_prefill.variants(of_budget, len(query), self.longest):
                part = slice(0, rows)
                self.attend(query[part], k[:, :, :keys], v[:, :, :keys], output[part], of_budget, None)

    def pages(self, kv_cache: torch.Tensor, numbers: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, ...]:
        assert self._layout is not None
        block = int(kv_cache.shape[2])  # in either layout
        count = -(-num_keys // block)
        space = self.space(kv_cache.dtype, kv_cache.device, count * block)
        k, v = gather(self._layout, kv_cache, numbers[:count], space)
        return k[:, :, :num_keys], v[:, :, :num_keys]


class Backend(FlashAttentionBackend):  # type: ignore[misc]
    """The host's, with Sparse-K."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Layer]:
        return Layer

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder
