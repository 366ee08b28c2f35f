"""Whether a tokenizer of Transformers is in order.

Some versions rebuild that of a GGUF file wrongly (5.17 that of Gemma 3), and one in a directory may be
damaged: then the words of a text come as single letters, the model answers nonsense, and what is measured is
wrong, all without an error.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

_WORD_STARTS: Final = ("Ġ", "▁")  # a space, in the vocabularies of byte-level BPE and of SentencePiece
_WORDS: Final = 256  # that are looked at
_FEW: Final = 16  # that tell nothing
_WHOLE: Final = 0.8  # of the words; in order they are 0.9999 or more
# Where fewer are whole, the tokenizer may be unlike others: it drops capitals, or joins words. Then they are
# in 1.1 to 1.2 pieces; where a quarter of what joins letters is lost, in 1.26.
_PIECES: Final = 1.25


def keeps_words_whole(tokenizer: Any) -> bool:
    """Whether words that are tokens of their own come out as these tokens, most of them, or in few pieces. A
    vocabulary with few words, or one that cannot be asked for, is in order.

    Args:
        tokenizer: of Transformers; `get_vocab()`, `unk_token_id` and a call with a text are used.
    """
    words = _words(tokenizer)
    if len(words) < _FEW:
        return True
    before = len(tokenizer("the")["input_ids"])
    found = [(number, len(word), tokenizer(f"the {word}")["input_ids"]) for number, word in words]
    whole = statistics.fmean(number in tokens for number, _, tokens in found)
    pieces = statistics.fmean(
        length if tokenizer.unk_token_id in tokens else len(tokens) - before for _, length, tokens in found
    )
    return whole >= _WHOLE or pieces <= _PIECES


def _words(tokenizer: Any) -> list[tuple[int, str]]:
    """Some words that are tokens, with their numbers."""
    try:
        vocabulary = tokenizer.get_vocab()
    except NotImplementedError:
        return []
    words = sorted((number, token[1:]) for token, number in vocabulary.items() if _is_word(token))
    return words[:: max(1, len(words) // _WORDS)]


def _is_word(token: Any) -> bool:
    if not isinstance(token, str) or len(token) <= 4:
        return False
    return token.startswith(_WORD_STARTS) and token[1:].isascii() and token[1:].isalpha()
