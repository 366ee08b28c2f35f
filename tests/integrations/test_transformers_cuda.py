"""Sparse-K in Transformers on a GPU: the GPU kernels run where they should, and every call is verified."""

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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TILES = SparseKConfig(select="tile", top_k=32, dense_layers=(1,), min_context=0)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return llama().to("cuda", torch.bfloat16)


class Verified:
    """An observer that verifies every call, and knows which kernels ran."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def __call__(self, _: int, p: Problem, out: torch.Tensor) -> None:
        verify(p, out, rows=32)
        self.kernels.append(dispatch._choose(p, "auto", "attention").__name__.rpartition(".")[2])


def test_a_prompt(model: Any) -> None:
    with enabled(model, TILES), observed(check := Verified()):
        model(tokens(2, 300).cuda())
    assert check.kernels == ["triton_prefill", "dense", "triton_prefill"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(model: Any, side: str) -> None:
    ids = tokens(2, 300).cuda()
    mask = torch.ones_like(ids)
    mask[0, slice(0, 90) if side == "left" else slice(210, 300)] = 0
    with enabled(model, TILES), observed(check := Verified()):
        model(ids, attention_mask=mask)
    assert check.kernels == ["triton_prefill", "dense", "triton_prefill"]


def test_packed_sequences(model: Any) -> None:
    positions = torch.cat([torch.arange(130), torch.arange(170)])[None].cuda()
    with enabled(model, TILES), observed(check := Verified()):
        model(tokens(1, 300).cuda(), position_ids=positions)
    assert check.kernels == ["triton_prefill", "dense", "triton_prefill"]


def test_steps_of_generation(model: Any) -> None:
    enable(model, TILES)
    cache = SparseKCache(model.config)
    ids = tokens(2, 300).cuda()
    model(ids[:, :297], past_key_values=cache, use_cache=True)
    with observed(check := Verified()):
        for i in range(297, 300):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert check.kernels == ["triton_decode", "dense", "triton_decode"] * 3
    assert cache.layers[0].index.length == 300


def test_compiled_is_eager(model: Any) -> None:
    enable(model, TILES)
    ids = tokens(1, 300).cuda()
    eager = model(ids).logits
    compiled = torch.compile(model, fullgraph=True)(ids).logits
    assert (compiled.float() - eager.float()).norm() < 0.05 * eager.float().norm()


def test_short_prompts_are_dense(model: Any) -> None:
    ids = tokens(1, 300).cuda()
    dense = model(ids).logits
    with enabled(model, SparseKConfig(min_context=0, dense_layers=())), observed(check := Verified()):
        sparse = model(ids).logits
    assert check.kernels == ["dense"] * LAYERS
    assert (sparse.float() - dense.float()).norm() < 0.05 * dense.float().norm()


def test_what_no_kernel_takes_is_dense_or_the_reference() -> None:
    ids = tokens(1, 300).cuda()
    for make, dtype in ((llama, torch.float32), (gemma2, torch.bfloat16)):
        model = make().to("cuda", dtype)
        with enabled(model, replace(TILES, dense_layers=())), observed(check := Verified()):
            model(ids)
        assert set(check.kernels) == {"reference"}
