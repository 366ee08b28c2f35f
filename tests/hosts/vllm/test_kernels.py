"""On a GPU: nothing is compiled, and no memory is asked for, in front of a user."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from .host import LLAMA, ON_CPU, alone, serving
from .test_batches import ALWAYS, run

pytestmark = pytest.mark.skipif(ON_CPU, reason="kernels are compiled on a GPU alone")

SHAPE = {
    **LLAMA,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 512,
    "max_position_embeddings": 40960,
}


def compiled() -> int:
    """Kernels that Triton has compiled for us in this process."""
    from sparsek.kernels import triton_kernels as kernels

    names = "sample", "prepare", "normalise", "score", "collect", "choose", "attend"
    caches = [cache[0] for name in names for cache in getattr(kernels, name).device_caches.values()]
    return sum(map(len, caches))


def random_lengths(folder: Path, settings: dict[str, Any]) -> None:
    rng = random.Random(0)
    with serving(folder, SHAPE, settings, max_num_batched_tokens=8192, enforce_eager=False) as llm:
        before = compiled()
        run(llm, [rng.randint(1, 40000) for _ in range(50)], steps=3)
        assert compiled() == before > 0


@pytest.mark.parametrize("settings", [{}, ALWAYS, {"top_k": 100, "select": "tile", "min_context": 300}])
def test_no_kernel_is_compiled_after_the_start(tmp_path: Path, settings: dict[str, Any]) -> None:
    alone(random_lengths, tmp_path, settings)


def longest_prompts(folder: Path) -> None:
    options = {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.95, "kv_cache_memory_bytes": None}
    with serving(folder, SHAPE, ALWAYS, **options) as llm:
        torch.cuda.reset_peak_memory_stats()
        run(llm, [40000, 40000, 40000])
        assert torch.cuda.max_memory_reserved() < 0.96 * torch.cuda.get_device_properties(0).total_memory


def test_memory_is_reserved_at_the_start(tmp_path: Path) -> None:
    alone(longest_prompts, tmp_path)
