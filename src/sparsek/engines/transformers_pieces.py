"""What the tokens of a Transformers tokenizer say, byte for byte.

Its own way back to a text is for whole texts: it drops the first space, may take other spaces out, and shows
bytes of a character that is not whole yet as U+FFFD. So tokens are read here as their vocabulary has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from transformers.convert_slow_tokenizer import bytes_to_unicode

Pieces = Callable[[Iterable[int]], Iterator[bytes]]

_BYTES: Final = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE
_BYTE: Final = re.compile("<0x([0-9A-Fa-f]{2})>")  # where SentencePiece has no token for a character
# Steps of a decoder that change texts as wholes: they join tokens, or cut what the first begins with.
_OF_WHOLE_TEXTS: Final = ("Fuse", "Strip")


def pieces_of(tokenizer: Any) -> Pieces:
    """From tokens of `tokenizer`, of Transformers, to the bytes of each as a continuation."""
    steps = _decoder_steps(tokenizer)
    kinds = {step["type"] for step in steps}
    read: Callable[[str], bytes]
    if kinds == {"ByteLevel"}:
        read = _byte_level
    elif steps and kinds <= {"Replace", "Metaspace", "ByteFallback", *_OF_WHOLE_TEXTS}:
        read = _sentence_piece(steps)
    else:
        return lambda tokens: _by_difference(tokenizer, tokens)
    added = {
        number: b"" if token.special else token.content.encode()
        for number, token in tokenizer.added_tokens_decoder.items()
    }

    def piece(token: int) -> bytes:
        if token in added:
            return added[token]
        written = tokenizer.convert_ids_to_tokens(token)
        return b"" if written is None else read(written)

    return lambda tokens: map(piece, tokens)


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    """Of the tokenizer's own decoder, as its file describes it; none where it has another form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _byte_level(written: str) -> bytes:
    if all(character in _BYTES for character in written):
        return bytes(_BYTES[character] for character in written)
    return written.encode()


def _sentence_piece(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    replaced = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    bytes_are_tokens = any(step["type"] == "ByteFallback" for step in steps)

    def read(written: str) -> bytes:
        byte = _BYTE.fullmatch(written) if bytes_are_tokens else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for pattern, text in replaced:
            written = text.join(pattern.split(written))
        return written.encode()

    return read


def _replacement(step: dict[str, Any]) -> tuple[re.Pattern[str], str]:
    """A pattern, and what stands for it in texts."""
    if step["type"] == "Metaspace":
        return re.compile(re.escape(step["replacement"])), " "
    (kind, pattern), *_ = step["pattern"].items()
    return re.compile(re.escape(pattern) if kind == "String" else pattern), step["content"]


def _by_difference(tokenizer: Any, tokens: Iterable[int]) -> Iterator[bytes]:
    """Of a tokenizer of another kind: what a text has more with a token than without, once it does not end in
    the middle of a character. The way of text-generation-inference: of two texts that begin alike."""

    def text(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # something to follow
    new: list[int] = []
    for token in tokens:
        new.append(token)
        known, longer = text(before), text(before + new)
        if len(longer) <= len(known) or longer.endswith("\ufffd"):
            yield b""
            continue
        yield longer[len(known) :].encode()
        before, new = new, []
