"""attention_varlen(): sequences packed one after the other are what each of them is alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sparsek import SparseKConfig, attention, attention_varlen

SPARSE = SparseKConfig(top_k=5, sinks=2, window=4, dense_layers=(), min_context=0)
TILES = SparseKConfig(select="tile", tile=32, top_k=5, min_context=30, dense_layers=())


def tensors(tokens: int) -> list[torch.Tensor]:
    """q, k, v: 4 query heads of size 8, 2 key/value heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 6))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def alone(q: Any, k: Any, v: Any, bounds: list[int], **options: Any) -> list[Any]:
    """One call for each sequence: [tokens of it, H, Dv]."""
    parts = []
    for start, stop in pairwise(bounds):
        inputs = (x[start:stop].swapaxes(0, 1)[None] for x in (q, k, v))
        parts.append(attention(*inputs, is_causal=True, **options)[0].swapaxes(0, 1))
    return parts


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("config", [SPARSE, TILES, SparseKConfig(min_context=50)])
@pytest.mark.parametrize("bounds", [[0, 150], [0, 1, 70, 70, 101, 150], [0, 0, 150, 150]])
def test_each_sequence_is_a_call_of_its_own(bounds: list[int], config: SparseKConfig, kind: str) -> None:
    inputs: list[Any] = tensors(150)
    if kind == "numpy":
        inputs = [x.numpy() for x in inputs]
    options = {"config": config, "scale": 0.3, "softcap": 20.0, "layer": 1}
    out = attention_varlen(*inputs, bounds, **options)
    assert type(out) is type(inputs[0])
    assert out.shape == (150, 4, 6)
    assert np.array_equal(out, np.concatenate(alone(*inputs, bounds, **options)))


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0, 30, 70], dtype=torch.int32),
        np.array([0, 30, 70]),
        (0, 30, 70),
        [np.int64(0), torch.tensor(30), 70],
    ],
)
def test_bounds_come_in_any_form(cu_seqlens: Any) -> None:
    inputs = tensors(70)
    want = attention_varlen(*inputs, [0, 30, 70], config=SPARSE)
    assert torch.equal(attention_varlen(*inputs, cu_seqlens, config=SPARSE), want)


def test_no_sequences() -> None:
    assert attention_varlen(*tensors(0), [0], config=SPARSE).shape == (0, 4, 6)
    assert attention_varlen(*tensors(0), [0, 0, 0], config=SPARSE).shape == (0, 4, 6)


def test_it_has_gradients() -> None:
    inputs = [x.requires_grad_() for x in tensors(70)]
    attention_varlen(*inputs, [0, 30, 70], config=SPARSE).sum().backward()
    got = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    torch.cat(alone(*inputs, [0, 30, 70], config=SPARSE)).sum().backward()
    for x, grad in zip(inputs, got, strict=True):
        torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (5, TypeError, "cu_seqlens = 5: must be a list, an array or a tensor of integers"),
        (None, TypeError, "cu_seqlens = None: must be a list, an array or a tensor of integers"),
        (torch.tensor(5), TypeError, "cu_seqlens = 5: must be a list, an array or a tensor of integers"),
        ([0, 2.0, 5], TypeError, "cu_seqlens[1] = 2.0: must be an integer"),
        (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens[0] = 0.0: must be an integer"),
        ([False, 5], TypeError, "cu_seqlens[0] = False: must be an integer"),
        (np.array([[0, 5]]), TypeError, "cu_seqlens[0] = [0, 5]: must be an integer"),
        ([], ValueError, "cu_seqlens = []: must start with 0"),
        ([1, 5], ValueError, "cu_seqlens[0] = 1: must be 0"),
        ([0, 4, 3, 5], ValueError, "cu_seqlens[2] = 3 after 4: must not fall"),
        ([0, 4], ValueError, "cu_seqlens ends with 4: must end with 5, the number of tokens in q"),
        ([0, 6], ValueError, "cu_seqlens ends with 6: must end with 5, the number of tokens in q"),
    ],
)
def test_bounds_that_are_wrong(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        attention_varlen(*tensors(5), cu_seqlens, config=SPARSE)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": [[[1.0]]]}, TypeError, "q is a list: must be a torch tensor or a numpy array"),
        (
            {"q": torch.zeros(1, 4, 5, 8)},
            ValueError,
            "q has shape [1, 4, 5, 8]: must have 3 axes, [tokens, he",
        ),
        ({"q": torch.zeros(4, 4, 8)}, ValueError, "q has 4 tokens and k 5: must be equal"),
        ({"q": torch.zeros(5, 3, 8)}, ValueError, "q has 3 heads and k 2: query heads must be a multiple"),
        (
            {"v": torch.zeros(4, 2, 6)},
            ValueError,
            "and v [1, 2, 4, 6]: batch, heads and tokens must be equal",
        ),
        ({"k": np.zeros((5, 2, 8))}, TypeError, "q is a Tensor and k a ndarray: must be of one kind"),
        ({"config": {}}, TypeError, "config = {}: must be a SparseKConfig"),
        ({"backend": "cuda"}, ValueError, "backend = 'cuda': must be one of"),
    ],
)
def test_inputs_that_are_wrong(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = tensors(5)
    with pytest.raises(error) as raised:
        attention_varlen(**{"q": q, "k": k, "v": v, "cu_seqlens": [0, 5], "config": SPARSE, **changed})
    assert message in str(raised.value)
