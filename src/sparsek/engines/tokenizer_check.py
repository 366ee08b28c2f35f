"""Whether a tokenizer that Transformers made of a GGUF file is in order.

Some versions rebuild it wrongly (5.17 that of Gemma 3): then the words of a text come as single letters, the
model answers nonsense, and what is measured is wrong, all without an error.
"""

from __future__ import annotations

from typing import Any, Final

_WORD_STARTS: Final = ("Ġ", "▁")  # a space, in the vocabularies of byte-level BPE and of SentencePiece
_WORDS: Final = 256  # that are looked at
_FEW: Final = 16  # that tell nothing
_LEAST: Final = 0.8  # of the words; in order they are 0.9999 or more


def keeps_words_whole(tokenizer: Any) -> bool:
    """Whether words that are tokens of their own come out as these tokens, most of them. A vocabulary with
    few words is in order.

    Args:
        tokenizer: of Transformers; `get_vocab()` and a call with a text are used.
    """
    words = sorted(
        (number, token[1:])
        for token, number in tokenizer.get_vocab().items()
        if token.startswith(_WORD_STARTS) and len(token) > 4 and token[1:].isascii() and token[1:].isalpha()
    )
    words = words[:: max(1, len(words) // _WORDS)]
    whole = sum(number in tokenizer(f"the {word}")["input_ids"] for number, word in words)
    return len(words) < _FEW or whole >= _LEAST * len(words)
