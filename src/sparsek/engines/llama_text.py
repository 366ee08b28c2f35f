"""From texts to llama.cpp's tokens and back, whole: what a buffer is too small for is asked for again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from .chat_template import chat_prompt, render
from .llama_model import LlamaModel
from .text import check_text

_TOO_LONG: Final = -(2**31)  # llama.cpp's answer to what its numbers cannot count
_PIECE: Final = 64  # bytes of a token; few have more
# What templates call them, and the fields of a file. Where a file names none, llama.cpp takes some other.
_SPECIAL: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


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
            ValueError: the chat template fails, or as `encode`.
        """
        template = self._lib.llama_model_chat_template(self._model.value, None)
        if not template:
            return self.encode(text)
        program, tokens = template.decode(errors="replace"), self._special_tokens()
        prompt = chat_prompt(
            lambda messages: render(program, messages, tokens), check_text(text), self._model.files.path
        )
        if self._lib.llama_vocab_get_add_bos(self._vocab):  # once, and llama.cpp puts it there
            prompt = prompt.removeprefix(tokens.get("bos_token", ""))
        return self.encode(prompt, special=True)

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """What each token says where it follows others, in UTF-8; nothing for one that is markup. llama.cpp's
        way back for whole texts takes spaces out for some models."""
        return (self._piece(token) for token in tokens)

    def _piece(self, token: int, *, special: bool = False) -> bytes:
        piece: bytes = _whole(
            lambda room, size: self._lib.llama_token_to_piece(self._vocab, token, room, size, 0, special),
            ctypes.c_char,
            _PIECE,
        )
        return piece

    def _special_tokens(self) -> dict[str, str]:
        metadata, known = self._model.files.metadata, range(self._model.vocabulary)
        numbers = {name: metadata.get(f"tokenizer.ggml.{field}_token_id") for name, field in _SPECIAL.items()}
        return {
            name: self._piece(number, special=True).decode(errors="replace")
            for name, number in numbers.items()
            if isinstance(number, int) and number in known
        }

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
