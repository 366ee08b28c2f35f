"""A layer of Transformers is sparse from `min_context` keys on that a row can see: not by what a cache has
room for, nor by the length of what several sequences are packed or padded to."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

from sparsek import SparseKConfig
from sparsek.integrations import transformers as integration
from sparsek.integrations.keys_seen import keys_seen

from .tiny_models import WINDOW, gemma2, gemma3, llama, tokens

CONFIG = SparseKConfig(top_k=4, sinks=1, window=2, dense_layers=(), min_context=40)


def sparse_layers(model: Any, *calls: dict[str, Any], config: SparseKConfig = CONFIG) -> list[list[int]]:
    """Of each call in turn."""
    found = []
    for call in calls:
        layers: list[int] = []

        def see(layer: int, p: Any, _: Any, layers: list[int] = layers) -> None:
            layers.extend([] if p.keeps_all else [layer])

        with torch.no_grad(), integration.enabled(model, config), integration.observed(see):
            model(**call)
        found.append(layers)
    return found


def steps(cache: Any, *lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(1, n), "past_key_values": cache, "use_cache": True} for n in lengths]


@pytest.mark.parametrize("room", [None, 200])
def test_whatever_room_a_cache_has(room: int | None) -> None:
    for make, whole in ((llama, [0, 1, 2]), (gemma3, [1]), (gemma2, [1])):
        model = make()
        cache = DynamicCache(config=model.config) if room is None else StaticCache(model.config, room)
        prompts_and_steps = steps(cache, 30, 9, 1, 1, 20, 1)  # 39 keys, then 40
        assert sparse_layers(model, *prompts_and_steps) == [[], [], whole, whole, whole, whole]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [39, 40, 100])
def test_a_window_in_every_layer(window: int, cache: str) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": window,
        "pad_token_id": 0,
    }
    for model in (MistralForCausalLM(MistralConfig(**shape)), Phi3ForCausalLM(Phi3Config(**shape))):
        whole = [0, 1] if window >= 40 else []
        held = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 200)
        calls = steps(held, 30, 90, 1)
        assert sparse_layers(model.eval(), *calls) == [[], whole, whole]


@pytest.mark.parametrize(("lengths", "sparse"), [((39, 39, 39), False), ((20, 60, 30), True)])
def test_packed_sequences_are_as_long_as_the_longest(lengths: tuple[int, ...], sparse: bool) -> None:
    total = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (sequence[:, None] == sequence) & torch.ones(total, total, dtype=torch.bool).tril()
    ids = tokens(1, total)
    model = llama()
    found = sparse_layers(
        model,
        {"input_ids": ids, "position_ids": positions, "use_cache": False},
        {"input_ids": ids, "position_ids": positions, "past_key_values": DynamicCache(config=model.config)},
        {"input_ids": ids, "attention_mask": mask[None, None], "use_cache": False},
    )
    assert found == [[0, 1, 2] if sparse else []] * 3


def test_padding_is_not_seen() -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :25] = mask[1, :21] = 0
    call = {"input_ids": tokens(2, 60), "attention_mask": mask, "use_cache": False}
    assert sparse_layers(llama(), call) == [[]]  # 39 keys at most
    mask[1, 20] = 1
    assert sparse_layers(llama(), call) == [[0, 1, 2]]


def test_auto_and_many_keys_go_by_what_is_seen() -> None:
    model, seen = gemma3(window=50), {}
    config = SparseKConfig(top_k=60, sinks=1, window=2, dense_layers=(), min_context=0)
    observed = integration.observed(lambda layer, p, _: seen.update({layer: p.keeps_all}))
    with torch.no_grad(), integration.enabled(model, config), observed:
        model(tokens(1, 200))
    assert seen == {0: True, 1: False, 2: True}


def test_numbers_that_forbid() -> None:
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 10, 8)
    mask = torch.zeros(1, 1, 3, 10)
    mask[..., 6:] = torch.finfo(torch.float32).min
    mask[0, 0, 0, 0] = 1.5  # adds to a score
    assert keys_seen(q, k, mask, None, None, enough=0, layer=None) == 6
    assert keys_seen(q, k, mask, None, None, enough=11, layer=None) == 10  # not looked at
    assert keys_seen(q, k, None, None, WINDOW, enough=0, layer=None) == 10
    assert keys_seen(q, k, None, None, 7, enough=0, layer=None) == 7
    starts = torch.tensor([[0, 0, 2]], dtype=torch.int32)
    assert keys_seen(q, k[:, :, :3], None, starts, None, enough=0, layer=None) == 2
