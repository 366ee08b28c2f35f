"""q, k and v of one attention call, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """q [B, H, Tq, D], k and v [B, Hkv, Tk, D], causal, and where they come from."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    source: str


def random_inputs(
    *,
    tokens: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Standard normal q, k, v, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(num_heads: int, length: int) -> torch.Tensor:
        x = torch.randn(batch, num_heads, length, head_dim, generator=generator, device=device)
        return x.to(DTYPES[dtype])

    return Inputs(normal(heads, queries), normal(kv_heads, tokens), normal(kv_heads, tokens), "random")
