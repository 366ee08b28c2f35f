"""Dense attention as it is called on a GPU: PyTorch's CPU takes the same call."""

from __future__ import annotations

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
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
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
