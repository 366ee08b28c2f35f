"""Sparse-K in Transformers with the GPU kernels: they run where they should, and every call is verified.
Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsek import SparseKConfig
from sparsek.integrations.transformers import SparseKCache, enable, enabled, observed
from sparsek.kernels import dispatch
from sparsek.problem import Problem
from sparsek.verify import verify

from .tiny_models import LAYERS, gemma2, llama, tokens

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_CARD else ("cpu", torch.float16)
needs_gpu = pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
TILES = SparseKConfig(select="tile", top_k=64, dense_layers=(1,), min_context=0)
DENSE = "dense" if ON_CARD else "cpu"
PROMPT = ["triton_prefill", DENSE, "triton_prefill"]
STEP = ["triton_decode", DENSE, "triton_decode"]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return llama().to(DEVICE, DTYPE)


class Verified:
    """An observer that verifies every call, and knows which kernels ran."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def __call__(self, _: int, p: Problem, out: torch.Tensor) -> None:
        verify(p, out, rows=32)
        self.kernels.append(dispatch._choose(p, "auto", "attention").__name__.rpartition(".")[2])


def test_a_prompt(model: Any) -> None:
    with enabled(model, TILES), observed(check := Verified()):
        model(tokens(2, 200).to(DEVICE))
    assert check.kernels == PROMPT


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(model: Any, side: str) -> None:
    ids = tokens(2, 200).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 70) if side == "left" else slice(150, 200)] = 0
    with enabled(model, TILES), observed(check := Verified()):
        model(ids, attention_mask=mask)
    assert check.kernels == PROMPT


def test_packed_sequences(model: Any) -> None:
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None].to(DEVICE)
    with enabled(model, TILES), observed(check := Verified()):
        model(tokens(1, 200).to(DEVICE), position_ids=positions)
    assert check.kernels == PROMPT


def test_steps_of_generation(model: Any) -> None:
    enable(model, TILES)
    cache = SparseKCache(model.config)
    ids = tokens(2, 200).to(DEVICE)
    model(ids[:, :197], past_key_values=cache, use_cache=True)
    with observed(check := Verified()):
        for i in range(197, 200):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert check.kernels == STEP * 3
    assert cache.layers[0].index.length == 200


@needs_gpu
def test_compiled_is_eager(model: Any) -> None:
    # What is fused is rounded in another way, and with few keys kept that changes which are.
    enable(model, replace(TILES, top_k=150))
    ids = tokens(1, 200).to(DEVICE)
    eager = model(ids).logits
    compiled = torch.compile(model, fullgraph=True)(ids).logits
    assert (compiled.float() - eager.float()).norm() < 0.05 * eager.float().norm()


@needs_gpu
def test_short_prompts_are_dense(model: Any) -> None:
    ids = tokens(1, 200).to(DEVICE)
    dense = model(ids).logits
    with enabled(model, SparseKConfig(min_context=0, dense_layers=())), observed(check := Verified()):
        sparse = model(ids).logits
    assert check.kernels == ["dense"] * LAYERS
    assert (sparse.float() - dense.float()).norm() < 0.05 * dense.float().norm()


@needs_gpu
def test_short_steps_are_dense(model: Any) -> None:
    """Where nobody looks they do not even come to the kernels."""
    ids = tokens(2, 200).to(DEVICE)
    dense = model(ids).logits[:, 150:]
    for config in (SparseKConfig(min_context=0, dense_layers=()), SparseKConfig(select="tile", top_k=500)):
        with enabled(model, config):
            cache = SparseKCache(model.config)
            model(ids[:, :150], past_key_values=cache, use_cache=True)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(150, 200)]
        assert (torch.cat(steps, 1).float() - dense.float()).norm() < 0.05 * dense.float().norm()
        assert cache.layers[0].index.length == 0


@needs_gpu
def test_what_no_kernel_takes_is_dense_or_the_reference() -> None:
    ids = tokens(1, 200).to(DEVICE)
    for make, dtype in ((llama, torch.float32), (gemma2, torch.bfloat16)):
        model = make().to("cuda", dtype)
        with enabled(model, replace(TILES, dense_layers=())), observed(check := Verified()):
            model(ids)
        assert set(check.kernels) == {"reference"}
