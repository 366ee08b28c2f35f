"""Without a mask, rows and keys are aligned as in Transformers' own SDPA; positions tell of packing alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsek import SparseKConfig, attention
from sparsek.integrations import transformers as integration

from .architectures import Architecture
from .tiny_models import llama, tokens

KEEP_ALL = SparseKConfig.pure(2**31 - 1)
SPARSE = SparseKConfig(top_k=3, sinks=1, window=2, dense_layers=(), min_context=0)


def attention_module(config: SparseKConfig, **attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module().eval()
    module.config = SimpleNamespace(sparsek=config.to_json())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def inputs(queries: int, keys: int, key_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, queries), (key_heads, keys), (key_heads, keys)
    q, k, v = (torch.randn(2, *shape, 16, generator=generator) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 10), (5, 10), (10, 10), (11, 10), (40, 10), (97, 1), (300, 130), (1, 1)]
)
@pytest.mark.parametrize("is_causal", [None, False])
def test_rows_and_keys_are_aligned_as_by_the_host(
    queries: int, keys: int, key_heads: int, is_causal: bool | None
) -> None:
    module = attention_module(KEEP_ALL, num_key_value_groups=4 // key_heads)
    q, k, v = inputs(queries, keys, key_heads)
    ours, host = (
        attend(module, q, k, v, None, is_causal=is_causal)[0]
        for attend in (integration.sparsek_attention, sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, host, rtol=1e-5, atol=1e-5)


def test_rows_beyond_the_keys_follow_the_reference() -> None:
    """As if there were as many keys, of which nobody may see those behind the last."""
    q, k, v = (x.double() for x in inputs(200, 70))
    ours = integration.sparsek_attention(attention_module(SPARSE), q, k, v, None)[0].transpose(1, 2)
    more_k, more_v = (torch.nn.functional.pad(x, (0, 0, 0, 130)) for x in (k, v))
    seen = (torch.arange(200) < 70).expand(200, 200)
    expected = attention(
        q, more_k, more_v, config=SPARSE, attn_mask=seen, is_causal=True, backend="reference"
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def in_groups(count: int, size: int) -> list[int]:
    return [i // size for i in range(count)]


@pytest.mark.parametrize(
    "positions",
    [
        list(range(24)),
        list(range(7, 31)),
        in_groups(24, 4),
        in_groups(24, 2),
        [0] * 24,
        [0, 0, *range(1, 23)],
        [*range(12), *range(5, 17)],  # back, but not to the beginning
        [*range(12), *range(40, 52)],
        list(range(23, -1, -1))[::-1],
    ],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_that_do_not_restart_at_zero_are_no_packing(positions: list[int], use_cache: bool) -> None:
    model, given = llama(), torch.tensor([positions])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        call = {"position_ids": given, "use_cache": use_cache}
        dense = model(tokens(1, 24), **call).logits
        integration.enable(model, KEEP_ALL)
        torch.testing.assert_close(model(tokens(1, 24), **call).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([0, 1, 2, 0, 1], [0, 0, 0, 3, 3]),
        ([0, 1, 0, 0, 1], [0, 0, 2, 3, 3]),  # a sequence of one token in between
        ([5, 6, 0, 1, 2], [0, 0, 2, 2, 2]),
        ([0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 4, 4, 4, 4]),  # groups of two, packed
        ([3, 2, 1, 0, 1], [0, 0, 0, 3, 3]),
    ],
)
def test_sequences_start_where_positions_fall_back_to_zero(positions: list[int], starts: list[int]) -> None:
    found = integration._sequence_starts(torch.tensor([positions]))
    assert found is not None
    assert found.tolist() == [starts]


def test_each_row_of_a_batch_has_its_own_sequences() -> None:
    found = integration._sequence_starts(torch.tensor([[0, 1, 2, 0], [0, 0, 1, 1], [0, 0, 1, 2]]))
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 6])
def test_layers_that_get_only_the_last_rows(static: bool, kept: int) -> None:
    """Gemma 4 cuts the rows of the layers that read the keys of earlier ones."""
    model = Architecture("Gemma4ForCausalLM", decodes=False).model()

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = StaticCache(model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
        prompt = model(tokens(2, 40), past_key_values=cache, logits_to_keep=kept).logits[:, -6:]
        return torch.cat([prompt, model(tokens(2, 1), past_key_values=cache).logits], 1)

    model.set_attn_implementation("eager")
    dense = logits()
    integration.enable(model, KEEP_ALL)
    torch.testing.assert_close(logits(), dense, rtol=1e-3, atol=1e-3)
