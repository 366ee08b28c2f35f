"""attn_implementation="sparsek" in every way that Transformers calls attention.

Each way is run twice: with a configuration that keeps everything, against the model's own eager attention;
and with one that does not, against the reference in float64 under an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparsek import SparseKConfig, problem
from sparsek.integrations import transformers as integration

from .tiny_models import WINDOW, gemma2, gemma3, llama, tokens, use_oracle

KEEP_ALL = SparseKConfig.pure(10_000)
SPARSE = SparseKConfig(top_k=5, sinks=2, window=4, dense_layers=(1,), min_context=0)
LENGTH = 150  # more than two blocks of 64
Way = Callable[[Any], torch.Tensor]


def prefill(model: Any) -> torch.Tensor:
    return model(tokens(2, LENGTH), use_cache=False).logits


def dynamic_cache(model: Any) -> torch.Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [LENGTH, 1, 1, 1])


def static_cache(model: Any) -> torch.Tensor:
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 40)
    return _in_steps(model, cache, [LENGTH, 1, 1, 1])


def chunked_prefill(model: Any) -> torch.Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [40, 70, 30, 1, 12])


def chunked_prefill_static(model: Any) -> torch.Tensor:
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 40)
    return _in_steps(model, cache, [40, 70, 30, 1, 12])


def decode_from_one_token(model: Any) -> torch.Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [1] * 30)


def left_padded(model: Any) -> torch.Tensor:
    ids, mask = _left_padded_batch()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def left_padded_with_cache(model: Any) -> torch.Tensor:
    ids, mask = _left_padded_batch()
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :-2], attention_mask=mask[:, :-2], past_key_values=cache).logits[:, -1]
    second = model(ids[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cache).logits[:, -1]
    third = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    return torch.stack([first, second, third])


def right_padded(model: Any) -> torch.Tensor:
    ids, mask = _left_padded_batch()
    ids, mask = ids.flip(1), mask.flip(1)
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def packed(model: Any) -> torch.Tensor:
    return model(tokens(1, LENGTH), position_ids=_packed_positions(), use_cache=False).logits


WAYS: list[Way] = [
    prefill,
    dynamic_cache,
    static_cache,
    chunked_prefill,
    chunked_prefill_static,
    decode_from_one_token,
    left_padded,
    left_padded_with_cache,
    right_padded,
    packed,
]


def _in_steps(model: Any, cache: Any, steps: list[int]) -> torch.Tensor:
    ids = tokens(2, sum(steps))
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(steps, 1)]
    return torch.cat(logits, 1)


def _left_padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, padding in enumerate([0, 37, LENGTH - 4]):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    return ids, mask


def _packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in (70, 13, LENGTH - 83)])[None]


@pytest.fixture(params=[llama, gemma3, gemma2], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_keeping_everything_is_dense_attention(model: Any, way: Way) -> None:
    model.set_attn_implementation("eager")
    dense = way(model)
    integration.enable(model, KEEP_ALL)
    torch.testing.assert_close(way(model), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_dropping_keys_follows_the_reference(model: Any, way: Way) -> None:
    expected = way(use_oracle(model, SPARSE))
    integration.enable(model, SPARSE)
    sparse = way(model)
    torch.testing.assert_close(sparse, expected, rtol=1e-3, atol=1e-3)
    integration.enable(model, KEEP_ALL)
    assert (way(model) - sparse).abs().max() > 0.01, "the sparse configuration must make a difference"


def test_packing_survives_a_cache() -> None:
    """Transformers loses packed sequences when a cache is used; their positions still tell."""
    model = integration.enable(llama(), SPARSE)
    with_cache = model(tokens(1, LENGTH), position_ids=_packed_positions(), use_cache=True).logits
    torch.testing.assert_close(with_cache, packed(model), rtol=1e-5, atol=1e-5)


def test_where_packed_sequences_start_is_found_out_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = integration.enable(llama(), SPARSE), []
    find = integration._sequence_starts
    monkeypatch.setattr(integration, "_sequence_starts", lambda x: (calls.append(1), find(x))[1])
    positions = _packed_positions()
    separate = model(tokens(1, LENGTH), position_ids=positions, use_cache=True).logits
    assert len(calls) == 1
    positions.copy_(torch.arange(LENGTH))
    together = model(tokens(1, LENGTH), position_ids=positions, use_cache=True).logits
    assert len(calls) == 2
    assert not torch.equal(separate, together)
    assert torch.equal(together, prefill(model)[:1])


def test_a_mask_is_looked_at_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = SparseKConfig(select="tile", top_k=5, dense_layers=(0,), min_context=0)
    model, calls = integration.enable(llama(), tiles), []
    find = problem.key_ranges
    monkeypatch.setattr(problem, "key_ranges", lambda *a, **b: (calls.append(1), find(*a, **b))[1])
    ids, mask = _left_padded_batch()
    kept = model(ids, attention_mask=mask, use_cache=False).logits
    assert len(calls) == 1
    mask[0, :20] = 0
    assert not torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, kept)
    assert len(calls) == 2


def test_a_gap_in_the_positions_is_no_new_sequence() -> None:
    model = integration.enable(llama(), SPARSE)
    positions = torch.arange(LENGTH)[None] + 30 * (torch.arange(LENGTH) >= 70)
    seen = model(tokens(1, LENGTH), position_ids=positions, use_cache=True).logits[:, -1]
    changed = tokens(1, LENGTH)
    changed[:, :60] = tokens(1, 60, seed=9)
    assert not torch.equal(model(changed, position_ids=positions, use_cache=True).logits[:, -1], seen)


def test_a_padded_row_is_as_if_alone() -> None:
    """Without centroids, which are taken over fixed blocks of positions, padding changes nothing."""
    config = SparseKConfig.pure(8)
    model = integration.enable(llama(), config)
    ids, mask = _left_padded_batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = model(ids[1:2, 37:], use_cache=False).logits
    torch.testing.assert_close(together[1, 37:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_follows_the_reference(model: Any, cache: str) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    expected = use_oracle(model, SPARSE).generate(tokens(1, 100), **options)
    integration.enable(model, SPARSE)
    assert model.generate(tokens(1, 100), **options).tolist() == expected.tolist()


def test_greedy_generation_in_a_padded_batch(model: Any) -> None:
    ids, mask = _left_padded_batch()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = use_oracle(model, SPARSE).generate(ids, **options)
    integration.enable(model, SPARSE)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_sliding_layers_are_left_alone_below_min_context() -> None:
    """A sliding layer's context is its window: shorter than min_context, it stays dense."""
    model, seen = gemma3(), {}
    config = SparseKConfig(top_k=5, sinks=1, window=2, dense_layers=(), min_context=WINDOW + 1)
    integration.enable(model, config)
    with integration.observed(lambda layer, problem, _: seen.update({layer: problem.keeps_all})):
        prefill(model)
    assert seen == {0: True, 1: False, 2: True}


def test_custom_float_mask_with_the_hosts_smallest_number() -> None:
    """Transformers writes "forbidden" as the smallest number of the dtype."""
    model = integration.enable(llama(), SPARSE)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[:, 10:50] = False
    allowed.fill_diagonal_(True)
    allowed = allowed[None, None]
    floating = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ids = tokens(1, LENGTH)
    torch.testing.assert_close(
        model(ids, attention_mask=floating, use_cache=False).logits,
        model(ids, attention_mask=allowed, use_cache=False).logits,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    expected = prefill(use_oracle(model, SPARSE))
    integration.enable(model, SPARSE)
    sparse = prefill(model)
    assert sparse.dtype == dtype
    assert (sparse - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch's compiler does not work in a folder with a space")
def test_compiled_model_gives_the_same() -> None:
    model = integration.enable(llama(), SPARSE)
    expected = [prefill(model), model(tokens(2, 40), use_cache=False).logits]
    compiled = torch.compile(model, fullgraph=True)
    actual = [prefill(compiled), compiled(tokens(2, 40), use_cache=False).logits]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiled_generation_gives_the_same() -> None:
    """With a static cache Transformers compiles the decoding step by itself."""
    model = integration.enable(llama(), SPARSE)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens(1, 100), disable_compile=True, **options)
    assert model.generate(tokens(1, 100), **options).tolist() == expected.tolist()
