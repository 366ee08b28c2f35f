from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsek import SparseKConfig
from sparsek.bench.baselines import BASELINES, flex_mask
from sparsek.bench.inputs import random_inputs
from sparsek.kernels import reference
from sparsek.problem import Problem, make_problem

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(1024, 1024), (256, 1024), (200, 1000), (1, 1000)]
KEEP_ALL = SparseKConfig.pure(1 << 20)


def problem(queries: int, tokens: int, config: SparseKConfig, **given: Any) -> Problem:
    inputs = random_inputs(tokens=tokens, queries=queries, heads=4, kv_heads=2, head_dim=64, **given)
    return make_problem(inputs.q, inputs.k, inputs.v, config=config, is_causal=True)


def on_cuda(queries: int, tokens: int, config: SparseKConfig = KEEP_ALL) -> Problem:
    return problem(queries, tokens, config, batch=2, dtype="bfloat16", device="cuda")


@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
@pytest.mark.parametrize("name", ["fastest", "sdpa", "dense"])
def test_dense_baselines_are_dense_attention(name: str, queries: int, tokens: int) -> None:
    p = problem(queries, tokens, KEEP_ALL)
    baseline = BASELINES[name](p)
    assert baseline is not None
    assert baseline.name == ("sdpa" if name == "fastest" else name)
    torch.testing.assert_close(baseline.call(), reference.attention(p))


@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
def test_flex_attends_to_as_many_keys_in_blocks_of_the_past(queries: int, tokens: int) -> None:
    config = SparseKConfig(select="tile", top_k=200, min_context=0)  # 284 keys: three blocks
    mask = flex_mask(problem(queries, tokens, config), 284)
    assert mask.shape == (1, 1, queries, tokens)
    blocks = mask.to_dense()[0, 0].bool()
    first = tokens - queries
    for row in range(blocks.shape[0]):
        begin = (first + 128 * row) // 128
        end = (min(first + 128 * (row + 1), tokens) - 1) // 128
        assert blocks[row, begin : end + 1].all()
        assert not blocks[row, end + 1 :].any()
        assert blocks[row].sum() == max(end - begin + 1, min(3, end + 1))


def test_flex_of_all_keys_is_dense() -> None:
    blocks = flex_mask(problem(1024, 1024, KEEP_ALL), 1024).to_dense()[0, 0]
    assert torch.equal(blocks, torch.ones(8, 8, dtype=blocks.dtype).tril())


@needs_cuda
@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
def test_sdpa_on_cuda_is_one_of_the_fast_kernels(queries: int, tokens: int) -> None:
    p = on_cuda(queries, tokens)
    baseline = BASELINES["sdpa"](p)
    assert baseline is not None
    assert baseline.name in ("cudnn", "flash")
    torch.testing.assert_close(baseline.call(), reference.attention(p), atol=2e-2, rtol=2e-2)


@needs_cuda
def test_sdpa_on_cuda_is_what_pytorch_chooses_where_neither_takes_it() -> None:
    p = problem(256, 256, KEEP_ALL, device="cuda")  # float32
    baseline = BASELINES["sdpa"](p)
    assert baseline is not None
    assert baseline.name == "sdpa"
    torch.testing.assert_close(baseline.call(), reference.attention(p), atol=5e-3, rtol=5e-3)


@needs_cuda
@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
def test_flex_on_cuda_attends_to_its_blocks(queries: int, tokens: int) -> None:
    config = SparseKConfig(select="tile", top_k=200, min_context=0)
    p = on_cuda(queries, tokens, config)
    baseline = BASELINES["flex"](p)
    assert baseline is not None
    blocks = flex_mask(p).to_dense()[0, 0].bool()
    allowed = blocks.repeat_interleave(128, 0)[:queries].repeat_interleave(128, 1)[:, :tokens]
    q, k, v = (x.float() for x in (p.q, p.k, p.v))
    dense = make_problem(q, k, v, config=KEEP_ALL, attn_mask=allowed, is_causal=True)
    expected = reference.attention(dense).to(p.q.dtype)
    torch.testing.assert_close(baseline.call(), expected, atol=2e-2, rtol=2e-2)
