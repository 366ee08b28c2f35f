"""The engine in Transformers: tokenizers made of GGUF files, and generation that goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsek import SparseKConfig
from sparsek.bench import model as bench
from sparsek.engines import transformers as engine
from sparsek.engines.model_file import embedded_model
from sparsek.engines.tokenizer_check import keeps_words_whole


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    model = embedded_model()
    return AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


def changed(tokenizer: Any, **model: Any) -> Any:
    """The tokenizer with other parts of its model."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"].update(model)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


def test_a_tokenizer_in_order(tokenizer: Any) -> None:
    assert keeps_words_whole(tokenizer)


def test_one_that_has_lost_what_joins_letters(tokenizer: Any) -> None:
    assert not keeps_words_whole(changed(tokenizer, merges=[]))


def test_one_that_has_lost_half_of_them(tokenizer: Any) -> None:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert not keeps_words_whole(changed(tokenizer, merges=merges[: len(merges) // 2]))


def test_one_without_words(tokenizer: Any) -> None:
    letters = {token: number for token, number in tokenizer.get_vocab().items() if len(token) == 1}
    assert keeps_words_whole(changed(tokenizer, vocab=letters, merges=[]))


def test_the_engine_refuses_words_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = changed(tokenizer, merges=[])
    monkeypatch.setattr(engine.AutoTokenizer, "from_pretrained", lambda **_: broken)
    with pytest.raises(ValueError, match=r"cuts its own words to pieces.*SmolLM2.*gguf"):
        engine.TransformersEngine(None)


@pytest.mark.parametrize(
    ("metadata", "bos"),
    [
        ({"add_bos_token": True, "bos_token_id": 2}, 2),
        ({"add_bos_token": False, "bos_token_id": 2, "model": "llama"}, None),
        ({"bos_token_id": 2, "model": "llama"}, 2),
        ({"bos_token_id": 2, "model": "gpt2"}, None),
        ({"add_bos_token": "false", "bos_token_id": 2}, None),
        ({"add_bos_token": True}, None),
    ],
)
def test_what_a_file_says_of_the_beginning(metadata: dict[str, Any], bos: int | None) -> None:
    assert engine._bos({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}) == bos


@pytest.fixture(scope="module")
def loaded() -> engine.TransformersEngine:
    return engine.TransformersEngine(None)


def test_a_text_begins_as_the_file_says(
    loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, chat = loaded.encode("Some text"), loaded.encode_chat("Hello")
    monkeypatch.setattr(loaded, "_bos", 17)
    assert loaded.encode("Some text") == [17, *text]
    monkeypatch.setattr(loaded, "_bos", chat[0])
    assert loaded.encode_chat("Hello") == chat  # once


def test_a_chat_template_that_fails(
    loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded._tokenizer, "chat_template", "{% for x in %}")
    with pytest.raises(ValueError, match=r"chat template of .*gguf fails, try --raw: TemplateSyntaxError"):
        loaded.encode_chat("Hello")
    monkeypatch.setattr(loaded._tokenizer, "chat_template", "")
    assert loaded.encode_chat("Hello") == loaded.encode("Hello")


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
