"""The engine in Transformers: generation that goes on, and models that are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np

from sparsek import SparseKConfig
from sparsek.bench import model as bench
from sparsek.engines import transformers as engine
from sparsek.engines.base import Part

from .. import tiny_gguf


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> engine.TransformersEngine:
    file = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return engine.TransformersEngine(str(tiny_gguf.llama().write(file)))


def test_generation_goes_on_where_it_ended(
    loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: two calls of 3 are one of 6; elsewhere they are the same 3 twice."""
    seen: list[int] = []
    step = loaded._step

    def spy(ids: Any, cache: Any) -> Any:
        seen.append(cache.get_seq_length())
        return step(ids, cache)

    monkeypatch.setattr(loaded, "_step", spy)
    prompt = loaded.encode("The cat sat on the mat and")
    for goes_on in (True, False):
        monkeypatch.setattr(loaded, "generation_goes_on", goes_on)
        seen.clear()
        once = loaded.generation(prompt, 3, None)
        once(), once()
        n = len(prompt)
        assert seen == [0, n, n + 1, n + 2, *(n + i + 3 * goes_on for i in range(3))]


def test_a_bench_of_it_verifies_both_ends_and_keeps_to_the_context(
    loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "generation_goes_on", True)
    config = SparseKConfig(top_k=4, min_context=0)
    planned = bench.tests([], 2, [40])

    def records() -> list[bench.BenchRecord]:
        return list(bench.bench(loaded, planned, [None, config], text="word " * 50, threads=2, repetitions=1))

    goes_on = records()[1].verified_rows
    monkeypatch.setattr(loaded, "generation_goes_on", False)
    assert goes_on == 2 * records()[1].verified_rows > 0
    monkeypatch.setattr(loaded, "generation_goes_on", True)
    monkeypatch.setattr(loaded, "context_length", 45)
    with pytest.raises(ValueError, match="46 tokens are more than the model's context of 45"):
        records()


CALLS: list[Callable[[engine.TransformersEngine, list[int]], Any]] = [
    lambda e, tokens: list(e.generate(tokens, 3, None)),
    lambda e, tokens: list(e.prompt(tokens, None)),
    lambda e, tokens: e.generation(tokens, 2, None),
    lambda e, tokens: list(e.logits([Part(tokens, None)])),
    lambda e, tokens: list(e.logits([Part(tokens, SparseKConfig.pure(2), step=4)])),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(
    tmp_path: Path,
    call: Callable[[engine.TransformersEngine, list[int]], Any],
    value: float,
) -> None:
    model = tiny_gguf.llama()
    model.tensors["token_embd.weight"][ord("x")] = value  # which no other text needs
    opened = engine.TransformersEngine(str(model.write(tmp_path / "damaged.gguf")))
    call(opened, opened.encode("good"))
    with pytest.raises(ValueError, match="the logits of damaged are not finite: are its weights damaged"):
        call(opened, opened.encode("bad: x"))


def test_each_row_of_logits_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = engine.TransformersEngine(str(tiny_gguf.llama().write(tmp_path / "tiny.gguf")))
    head = opened._head

    def damaged(states: Any) -> Any:
        logits = head(states).clone()
        if len(logits) > 1:
            logits[1, 5] = np.nan
        return logits

    monkeypatch.setattr(opened, "_head", damaged)
    with pytest.raises(ValueError, match="the logits of tiny are not finite"):
        list(opened.logits([Part(opened.encode("some text"), None)]))


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "ffn_norm"])
def test_weights_that_attention_would_make_zeros_of_are_an_error(tmp_path: Path, name: str) -> None:
    model = tiny_gguf.llama()
    model.tensors[f"blk.1.{name}.weight"].flat[-1] = np.nan
    with pytest.raises(
        ValueError, match=r"weights are not finite, model\.layers\.1\.\S* among them: .*a\.gguf"
    ):
        engine.TransformersEngine(str(model.write(tmp_path / "a.gguf")))
