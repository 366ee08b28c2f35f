"""Dense attention as it is called on a GPU: PyTorch's CPU takes the same call."""

from __future__ import annotations

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


def test_a_step_leaves_the_choice_of_kernels_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is left out, but not where the caller wants it alone."""
    device = "cuda" if ON_CARD else "cpu"
    q, k, v = (torch.randn(1, 4, n, 64, device=device, dtype=torch.bfloat16) for n in (1, 50, 50))
    switches, seen = torch.backends.cuda, []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(switches.cudnn_sdp_enabled())
        return sdpa(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for flash in (True, False):
        monkeypatch.setattr(switches, "flash_sdp_enabled", lambda flash=flash: flash)
        dense.step(q, k, v, 0.1)
        assert switches.cudnn_sdp_enabled()
    assert seen == [False, True]
