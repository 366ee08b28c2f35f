"""A model that is switched on, but dense, says so once."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from sparsek import SparseKConfig
from sparsek.integrations import dense_notice
from sparsek.integrations.dense_notice import say_if_dense
from sparsek.integrations.transformers import SparseKCache, enable, enabled, register

from .tiny_models import LAYERS, WINDOW, gemma3, llama, tokens

SHORT = (
    "Sparse-K is on, but attention is dense while the context is below min_context, {} < {} tokens "
    "(min_context=0 uses K everywhere)"
)


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, dense_notice.log.name)  # the command line has another
    monkeypatch.setattr(dense_notice, "_said", set())


@torch.no_grad()
def said(caplog: pytest.LogCaptureFixture, model: Any, *lengths: int) -> list[str]:
    """What it warns of in prompts of these lengths, each followed by two steps."""
    caplog.clear()
    for length in lengths:
        cache = SparseKCache(model.config)
        for ids in (tokens(1, length), tokens(1, 1), tokens(1, 1)):
            model(ids, past_key_values=cache, use_cache=True)
    return [record.getMessage() for record in caplog.records if record.name == dense_notice.log.name]


def test_once_for_all_layers_and_calls(caplog: pytest.LogCaptureFixture) -> None:
    model = enable(llama(), SparseKConfig(top_k=8))
    assert said(caplog, model, 40, 50) == [SHORT.format(40, 2048)]
    assert said(caplog, enable(llama(), SparseKConfig(top_k=8)), 60) == []


def test_another_configuration_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    for config in (SparseKConfig(), SparseKConfig(min_context=41)):
        with enabled(model, config):
            assert said(caplog, model, 40) == [SHORT.format(40, config.min_context)]


def test_loaded_by_name(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparsek").eval()
    assert said(caplog, model, 40) == [SHORT.format(40, 2048)]


def test_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = enable(llama(), SparseKConfig())
    assert said(caplog, torch.compile(model, fullgraph=True, backend="eager"), 40) == [SHORT.format(40, 2048)]


@pytest.mark.parametrize(
    "config",
    [
        SparseKConfig(min_context=40),
        SparseKConfig(top_k=2048),
        SparseKConfig(top_k=(2048,) * LAYERS),
        SparseKConfig(dense_layers=tuple(range(LAYERS))),
        SparseKConfig.pure(1000),
    ],
)
def test_long_enough_or_everything_wanted_is_silent(
    caplog: pytest.LogCaptureFixture, config: SparseKConfig
) -> None:
    assert said(caplog, enable(llama(), config), 40, 50) == []


def test_sliding_windows_speak_where_no_layer_sees_more(caplog: pytest.LogCaptureFixture) -> None:
    config = SparseKConfig(min_context=WINDOW + 1, top_k=8)
    assert said(caplog, enable(gemma3(), config), 40) == []
    sliding = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
    )
    mistral = enable(MistralForCausalLM(sliding).eval(), config)
    assert said(caplog, mistral, 40) == [SHORT.format(WINDOW, WINDOW + 1)]


def prompt(queries: int, keys: int) -> tuple[Any, Any]:
    """On a GPU, 32 heads of 128."""
    return (
        SimpleNamespace(shape=(1, heads, n, 128), is_cuda=True) for heads, n in ((32, queries), (8, keys))
    )


def test_on_a_gpu_it_is_the_size(caplog: pytest.LogCaptureFixture) -> None:
    config = SparseKConfig()
    for queries, keys in ((1, 4096), (256, 4096), (16384, 16384)):  # a step, a part, a long prompt
        say_if_dense(config, *prompt(queries, keys), layer=1, seen=keys)
    assert caplog.messages == []
    for length in (4096, 1024):
        say_if_dense(config, *prompt(length, length), layer=1, seen=length)
    assert caplog.messages == [
        "Sparse-K is on, but attention is dense to 4096 tokens on a GPU, for that is faster "
        '(select="tile" with min_context=0 uses K everywhere)'
    ]
