"""The tokenizers that Transformers makes of GGUF files."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def test_one_without_words(tokenizer: Any) -> None:
    letters = {token: number for token, number in tokenizer.get_vocab().items() if len(token) == 1}
    assert keeps_words_whole(changed(tokenizer, vocab=letters, merges=[]))


def test_the_engine_refuses_words_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = changed(tokenizer, merges=[])
    monkeypatch.setattr(engine.AutoTokenizer, "from_pretrained", lambda **_: broken)
    with pytest.raises(ValueError, match=r"reads the tokenizer of this file wrongly.*SmolLM2.*gguf"):
        engine.TransformersEngine(None)


def test_a_text_begins_as_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = engine.TransformersEngine(None)
    text = loaded.encode("Some text")
    monkeypatch.setattr(loaded, "_begins_with_bos", True)
    begun = loaded.encode("Some text")
    assert begun[1:] == text
    assert loaded.decode(begun) == "Some text"  # the first is no text
