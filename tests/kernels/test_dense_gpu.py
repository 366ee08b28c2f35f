"""Dense attention as it is called on a GPU: PyTorch's CPU takes the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsek import SparseKConfig
from sparsek.kernels import dense, reference
from sparsek.problem import make_problem

ON_CARD = torch.cuda.is_available()


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 9), (1, 9), (12, 9)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_prompts_chunks_and_steps(
    queries: int, keys: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_CARD:
        monkeypatch.setattr(dense, "has_gpu_kernels", lambda *_: True)
    dtype, device = (torch.bfloat16, "cuda") if ON_CARD else (torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=generator).to(device, dtype)
        for heads, n in ((4, queries), (2, keys), (2, keys))
    )
    config = SparseKConfig(select="query")  # below min_context: dense
    p = make_problem(q, k, v, config=config, is_causal=is_causal)
    out = dense.attention(p)
    expected = reference.attention(p)
    assert (out.double() - expected.double()).abs().max() <= (0.03 if ON_CARD else 1e-5)


@pytest.mark.skipif(not ON_CARD, reason="looks at which of PyTorch's kernels runs on a GPU")
def test_a_step_is_flash_attention_where_the_caller_allows_it() -> None:
    """Not cuDNN's, and nothing is switched for others."""
    q, k, v = (
        torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16)
        for heads, n in ((8, 1), (2, 50), (2, 50))
    )
    switches = torch.backends.cuda
    torch.nn.functional.scaled_dot_product_attention(q, q, q)  # PyTorch makes up its own mind first
    before = switches.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order()
    assert "flash" in kernels(lambda: dense.step(q, k, v, 0.1))
    switches.enable_flash_sdp(False)
    try:
        assert "flash_fwd" not in kernels(lambda: dense.step(q, k, v, 0.1))
    finally:
        switches.enable_flash_sdp(True)
    assert before == (switches.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order())


def kernels(call: Callable[[], Any]) -> str:
    """The names of the kernels that run on the GPU."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())
