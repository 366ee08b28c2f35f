"""Whether a tokenizer that Transformers made of a GGUF file is in order.

Some versions rebuild it wrongly (5.17 that of Gemma 3): then the words of a text come as single letters, the
model answers nonsense, and what is measured is wrong, all without an error.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

_WORD_STARTS: Final = ("Ġ", "▁")  # a space, in the vocabularies of byte-level BPE and of SentencePiece
_WORDS: Final = 256


def keeps_words_whole(tokenizer: Any) -> bool:
    """Whether words that are tokens of their own come out as these tokens, most of them. A vocabulary that
    has no words is in order.

    Args:
        tokenizer: of Transformers; `get_vocab()` and a call with a text are used.
    """
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    words = (
        (number, vocabulary[number][1:])
        for number in sorted(vocabulary)
        if vocabulary[number].startswith(_WORD_STARTS)
    )
    known = (pair for pair in words if len(pair[1]) > 3 and pair[1].isascii() and pair[1].isalpha())
    whole = [number in tokenizer(f"the {word}")["input_ids"] for number, word in islice(known, _WORDS)]
    return 2 * sum(whole) >= len(whole)
