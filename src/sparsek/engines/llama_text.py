"""From texts to llama.cpp's tokens and back, whole: what a buffer is too small for is asked for again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from . import llama_api as api
from .llama_model import LlamaModel
from .text import check_text

_TOO_LONG: Final = -(2**31)  # llama.cpp's answer to what its numbers cannot count


class Tokenizer:
    """Of a loaded model."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._lib = model, model.lib
        self._vocab = self._lib.llama_model_get_vocab(model.value)
        self._added = self._added_at_the_end()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text that goes on: without the end token that some models want. `special`: markup in
        the text is that of the chat format.

        Raises:
            ValueError: llama.cpp would not take all of the text.
        """
        data = check_text(text).encode()
        tokens = _whole(
            lambda room, size: self._lib.llama_tokenize(
                self._vocab, data, len(data), room, size, True, special
            ),
            ctypes.c_int32,
            len(data) + 8,
        )
        return tokens[:-1] if tokens and tokens[-1] in self._added else list(tokens)

    def encode_chat(self, text: str) -> list[int]:
        """`text` as a user's message in the model's chat format; plain where it has none.

        Raises:
            ValueError: llama.cpp does not know the format, or as `encode`.
        """
        template = self._lib.llama_model_chat_template(self._model.value, None)
        if not template:
            return self.encode(text)
        data = check_text(text).encode()
        message = api.ChatMessage(b"user", data)

        def apply(room: Any, size: int) -> int:
            length: int = self._lib.llama_chat_apply_template(
                template, ctypes.byref(message), 1, True, room, size
            )
            if length < 0:
                raise ValueError(
                    f"llama.cpp does not know the chat template, --raw does without: {self._model.files.path}"
                )
            return length

        return self.encode(_whole(apply, ctypes.c_char, 2 * len(data) + 4096).decode(), special=True)

    def decode(self, tokens: list[int]) -> str:
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        text: bytes = _whole(
            lambda room, size: self._lib.llama_detokenize(
                self._vocab, given, len(tokens), room, size, True, False
            ),
            ctypes.c_char,
            16 * len(tokens) + 64,
        )
        return text.decode(errors="replace")

    def ends(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def _added_at_the_end(self) -> set[int]:
        """Tokens that llama.cpp puts behind every text of this model."""
        added = set()
        if self._lib.llama_vocab_get_add_eos(self._vocab):
            added.add(int(self._lib.llama_vocab_eos(self._vocab)))
        if self._lib.llama_vocab_get_add_sep(self._vocab):
            added.add(int(self._lib.llama_vocab_sep(self._vocab)))
        return added


def _whole(fill: Callable[[Any, int], int], kind: Any, size: int) -> Any:
    """What `fill(room, size)` writes into an array of `kind`. It returns how much it wrote; or what it needs,
    as a number that is more than `size` or negative."""
    for _ in range(2):
        room = (kind * size)()
        count = fill(room, size)
        if count == _TOO_LONG:
            break
        if 0 <= count <= size:
            return room[:count]
        size = abs(count)
    raise ValueError("the text is too long for llama.cpp")
