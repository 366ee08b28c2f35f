"""What a model says is printed byte for byte, in both engines, whatever its tokenizer is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from sparsek.engines.llama import LlamaEngine
from sparsek.engines.text import whole_characters
from sparsek.engines.transformers import TransformersEngine
from sparsek.engines.transformers_pieces import pieces_of

from .. import tiny_gguf
from ..tiny_gguf import BOS, EOS

ENGINES: tuple[Callable[[str], Any], ...] = (partial(LlamaEngine, threads=1), TransformersEngine)
NAMES = ["llama", "transformers"]
PRE = ["llama-bpe", "default", "gpt-2", "falcon", "mpt", "chatglm-bpe", "smollm", "qwen2", "tekken"]
TEXTS = [
    "x !=y",
    "a, .b",
    "I 'm",
    "f ?g",
    "do 'nt",
    " .",
    "\t\n\r x",
    "é €",
    "日本",
    "\N{GRINNING FACE}!",
    "\ufffd.",
]
WORDS = ["▁cat", "▁dog"]


def said(engine: Any, prompt: list[int], count: int) -> str:
    return "".join(whole_characters(engine.pieces(engine.generate(prompt, count, None))))


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
@pytest.mark.parametrize("pre", PRE)
def test_byte_level_vocabularies(tmp_path: Path, pre: str, make: Callable[[str], Any]) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.ggml.pre"] = pre
    engine = make(str(model.write(tmp_path / "tiny.gguf")))
    for text in TEXTS:
        assert list(engine.pieces(text.encode())) == [bytes([byte]) for byte in text.encode()]
        assert engine.decode(text.encode()) == text
    assert list(engine.pieces([BOS, *b"a", EOS])) == [b"", b"a", b""]  # markup
    assert engine.decode([0xE9, *b"a"]) == "\ufffda"


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
def test_sentence_piece_vocabularies(tmp_path: Path, make: Callable[[str], Any]) -> None:
    engine = make(str(tiny_gguf.sentence_piece(["▁cat", "▁▁"]).write(tmp_path / "tiny.gguf")))
    assert list(engine.pieces([259, 260, 259])) == [b" cat", b"  ", b" cat"]
    euro = [3 + byte for byte in "€".encode()]
    assert list(engine.pieces([1, *euro, 259, 2])) == [b"", *(bytes([b]) for b in "€".encode()), b" cat", b""]


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
@pytest.mark.parametrize("text", [text for text in TEXTS if len(set(text.encode())) == len(text.encode())])
def test_what_a_model_says(tmp_path: Path, text: str, make: Callable[[str], Any]) -> None:
    model = tiny_gguf.says_in_a_circle(list(text.encode()))
    model.fields["tokenizer.ggml.pre"] = "llama-bpe"
    engine = make(str(model.write(tmp_path / "tiny.gguf")))
    assert said(engine, [BOS, *b"q"], 3 * len(text.encode())) == 3 * text


@pytest.mark.parametrize("make", ENGINES, ids=NAMES)
def test_the_first_space_of_a_continuation(tmp_path: Path, make: Callable[[str], Any]) -> None:
    model = tiny_gguf.says_in_a_circle([259, 260], tiny_gguf.sentence_piece(WORDS))
    engine = make(str(model.write(tmp_path / "tiny.gguf")))
    assert said(engine, engine.encode("I saw a"), 4) == " cat dog cat dog"


def test_what_is_no_whole_character_is_held_back() -> None:
    def pieces() -> Iterator[bytes]:
        for byte in "a€b".encode():
            told.append(byte)
            yield bytes([byte])

    told: list[int] = []
    come = whole_characters(pieces())
    assert [(next(come), len(told)) for _ in range(3)] == [("a", 1), ("€", 4), ("b", 5)]
    assert list(whole_characters([b"x", b"\xe2\x82"])) == ["x"]
    assert "".join(whole_characters([b"\xc3\xa9\xe2", b"\x82", b"!", b"\x80", b"\xef\xbf\xbd"])) == (
        "é\ufffd!\ufffd\ufffd"
    )


# ---- Tokenizers of Transformers that no GGUF file makes


def fast(decoder: Any, model: Any = None) -> PreTrainedTokenizerFast:
    vocabulary = {
        word: i for i, word in enumerate(["[UNK]", "a", "the", "##re", "cat", "<0xC3>", "<0xA9>", "▁x"])
    }
    made = Tokenizer(model or WordLevel(vocabulary, unk_token="[UNK]"))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)


def test_what_is_said_of_whole_texts_does_not_count() -> None:
    replaced = decoders.Replace("▁", " ")
    steps = [replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    for decoder in (decoders.Sequence(steps), decoders.Sequence(steps[:3])):
        assert list(pieces_of(fast(decoder))([7, 5, 6, 4])) == [b" x", b"\xc3", b"\xa9", b"cat"]
    assert list(pieces_of(fast(decoders.Metaspace()))([7, 5, 7])) == [b" x", b"<0xC3>", b" x"]


def test_added_tokens_are_as_they_are_written() -> None:
    tokenizer = fast(decoders.ByteLevel())
    tokenizer.add_tokens(["é▁ !"])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    new, end = tokenizer.convert_tokens_to_ids(["é▁ !", "<end>"])
    assert list(pieces_of(tokenizer)([new, end, 4, 10**6])) == ["é▁ !".encode(), b"", b"cat", b""]


def test_another_kind_of_tokenizer() -> None:
    tokenizer = fast(
        decoders.WordPiece(cleanup=False),
        WordPiece({"[UNK]": 0, "a": 1, "the": 2, "##re": 3, "'": 4, "!": 5}),
    )
    assert b"".join(pieces_of(tokenizer)([2, 3, 5, 4, 2])) == b" there ! ' the"
    assert b"".join(pieces_of(fast(None))([2, 4])) == b" the cat"
