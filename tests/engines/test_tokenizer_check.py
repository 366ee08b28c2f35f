"""Tokenizers in order, unusual ones among them, and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsek.bench.text import read_text
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
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda **_: broken)
    with pytest.raises(ValueError, match=r"cuts its own words to pieces.*SmolLM2.*gguf"):
        engine.TransformersEngine(None)


def test_one_that_gives_the_unknown_token_for_every_word() -> None:
    words = {f"Ġ{word}": i for i, word in enumerate(["unknown", *(f"word{chr(97 + i)}" for i in range(26))])}
    strict = Tokenizer(models.WordLevel(words, unk_token="Ġunknown"))
    assert not keeps_words_whole(PreTrainedTokenizerFast(tokenizer_object=strict, unk_token="Ġunknown"))


def trained(model: Any, trainer: Any, pre_tokenizer: Any) -> Any:
    """A small one of that kind, on Python's manual."""
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator(read_text(None)[1][:200_000].splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


SMALL = {"vocab_size": 800, "show_progress": False}
KINDS: dict[str, Callable[[], Any]] = {
    "pieces of words": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(special_tokens=["<unk>"], **SMALL),
        pre_tokenizers.Whitespace(),
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", **SMALL),
        pre_tokenizers.Metaspace(),
    ),
    "words that are joined": lambda: trained(
        models.BPE(), trainers.BpeTrainer(max_token_length=20, **SMALL), pre_tokenizers.Metaspace(split=False)
    ),
    "letters": lambda: trained(models.BPE(), trainers.BpeTrainer(vocab_size=1), pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_ones(kind: str) -> None:
    assert keeps_words_whole(KINDS[kind]())


def test_one_that_drops_capitals(tokenizer: Any) -> None:
    lower = changed(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert keeps_words_whole(lower)


def test_one_that_splits_at_capitals(tokenizer: Any) -> None:
    camel = changed(tokenizer)
    first = pre_tokenizers.Split(Regex("(?<=[a-z])(?=[A-Z])"), "isolated")
    camel.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, camel.backend_tokenizer.pre_tokenizer]
    )
    assert keeps_words_whole(camel)


def test_one_that_does_not_tell_its_words(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotImplementedError

    silent = changed(tokenizer, merges=[])
    monkeypatch.setattr(silent, "get_vocab", lambda: {b"bytes": 1})
    assert keeps_words_whole(silent)
    monkeypatch.setattr(silent, "get_vocab", refuse)
    assert keeps_words_whole(silent)
