"""Which layers are sparse where some have a sliding window: by the keys that a row can see, and so the same
in every engine, whatever a cache has room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from sparsek import SparseKConfig
from sparsek.engines.llama import LlamaEngine
from sparsek.engines.llama_context import Context
from sparsek.integrations import llama_cpp
from sparsek.integrations import transformers as hf
from sparsek.policy import auto_top_k

from .. import tiny_gguf
from ..integrations import tiny_models

MIN_CONTEXT = 600
LENGTH = 1100  # three batches of llama.cpp
CONFIG = SparseKConfig(top_k=8, sinks=1, window=2, dense_layers=(), min_context=MIN_CONTEXT)
WINDOWS = (200, MIN_CONTEXT - 1, MIN_CONTEXT, 800, 4096)
SLIDING, WHOLE = 0, 1  # layers


class Call(NamedTuple):
    """One operation: the keys that its last row may see, and what the rule is; None: all are kept."""

    layer: int
    seen: int
    top_k: int | None


Opened = Callable[[int], LlamaEngine]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def engine(window: int) -> LlamaEngine:
        if window not in known:
            file = tiny_gguf.gemma2(window).write(Path(folder, f"{window}.gguf"))
            known[window] = LlamaEngine(str(file), threads=1)
        return known[window]

    return engine


def calls_of(context: Context, tokens: list[int]) -> list[Call]:
    """Of a prompt, and of a step after it."""
    found = []

    def see(layer: int, problem: Any, _: Any) -> None:
        seen = int(problem.mask[0, 0, -1].sum())
        found.append(Call(layer, seen, None if problem.keeps_all else problem.rule.top_k))

    with llama_cpp.observed(see):
        context.submit(tokens)
    return found


@pytest.mark.parametrize("window", WINDOWS)
def test_in_llama_cpp_the_mask_says_it(opened: Opened, window: int) -> None:
    """With a cache of sliding layers that is whole, as in `run`, `bench`, `eval` and `tune`, and with one of
    their window, as in `serve` and llama-server."""
    engine = opened(window)
    tokens = engine.encode("ab cd " * LENGTH)[:LENGTH]
    for whole in (True, False):
        context = engine._new_context(LENGTH + 10, CONFIG, swa_full=whole)
        calls = calls_of(context, tokens)
        ends = [512, 1024, LENGTH]
        assert [(c.layer, c.seen) for c in calls] == [
            (layer, min(end, window) if layer == SLIDING else end) for end in ends for layer in (0, 1)
        ]
        for call in calls:
            assert call.top_k == (8 if call.seen >= MIN_CONTEXT else None)
        steps = calls_of(context, tokens[:1])
        assert {c.layer: c.top_k for c in steps}[WHOLE] == 8
        sparse = [c for c in steps if c.layer == SLIDING and c.top_k is not None]
        assert len(sparse) == (window >= MIN_CONTEXT)


def test_the_same_batches_are_computed_whatever_the_cache(opened: Opened) -> None:
    """Not only which layers: what they say."""
    for window in WINDOWS:
        engine = opened(window)
        tokens = engine.encode("ab cd " * LENGTH)[:LENGTH]
        said = []
        for whole in (True, False):
            context = engine._new_context(LENGTH + 10, replace(CONFIG, tail="none"), swa_full=whole)
            context.submit(tokens)
            said.append(context.logits(1))
        assert abs(said[0] - said[1]).max() < 1e-4


@pytest.mark.parametrize("window", WINDOWS)
def test_explicit_k_without_a_minimum_is_for_all_layers(opened: Opened, window: int) -> None:
    engine, config = opened(window), replace(CONFIG, min_context=0)
    tokens = engine.encode("ab cd " * LENGTH)[:LENGTH]
    for whole in (True, False):
        calls = calls_of(engine._new_context(LENGTH + 10, config, swa_full=whole), tokens)
        assert [call.top_k for call in calls] == [8] * 6
        many = replace(config, top_k=300)  # more than some windows have
        calls = calls_of(engine._new_context(LENGTH + 10, many, swa_full=whole), tokens)
        assert [call.top_k for call in calls] == [300 if c.seen > 300 else None for c in calls]


def test_auto_goes_by_the_window(opened: Opened) -> None:
    window, length = 1500, 3000
    engine, config = opened(window), replace(CONFIG, top_k="auto")
    tokens = engine.encode("ab cd " * length)[:length]
    for whole in (True, False):
        calls = calls_of(engine._new_context(length + 10, config, swa_full=whole), tokens)
        last = {call.layer: call.top_k for call in calls[-2:]}
        assert last == {SLIDING: auto_top_k(window), WHOLE: auto_top_k(length)}
        assert last[SLIDING] != last[WHOLE]


@pytest.mark.parametrize("window", WINDOWS)
def test_transformers_says_the_same(window: int) -> None:
    model = tiny_models.gemma3(window=window, context=LENGTH + 1)
    found: dict[int, bool] = {}
    seen = hf.observed(lambda layer, p, _: found.update({layer: not p.keeps_all}))
    with torch.no_grad(), hf.enabled(model, CONFIG), seen:
        model(tiny_models.tokens(1, LENGTH))
    sparse = window >= MIN_CONTEXT
    assert found == {0: sparse, 1: True, 2: sparse}
