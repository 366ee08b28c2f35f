"""From texts to Transformers' tokens and back, whole and without an end that the text does not have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .chat_template import Message, chat_prompt
from .text import check_text
from .transformers_loading import load_tokenizer
from .transformers_pieces import pieces_of


class Tokenizer:
    """Of the model at `path`. `metadata`: of a GGUF file, empty for a directory."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path, self._tokenizer = path, load_tokenizer(path)
        self._pieces = pieces_of(self._tokenizer)
        self._bos, self._added = _bos(metadata), _added_at_the_end(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that goes on: without the end token that some models want. Raises ValueError when
        the text cannot be taken whole."""
        tokens = list(self._tokenizer(check_text(text))["input_ids"])
        end = len(tokens) - len(self._added)
        return self._begun(tokens[:end] if tokens[end:] == self._added else tokens)

    def encode_chat(self, text: str) -> list[int]:
        """`text` as a user's message in the model's chat format; plain where it has none. Raises as `encode`,
        and where the template fails."""
        if not self._tokenizer.chat_template:
            return self.encode(text)
        prompt = chat_prompt(self._render, check_text(text), self._path)
        return self._begun(list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"]))

    def _render(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """As `base.Engine`."""
        return self._pieces(tokens)

    @property
    def eos(self) -> int | None:
        token: int | None = self._tokenizer.eos_token_id
        return token

    def _begun(self, tokens: list[int]) -> list[int]:
        """Some versions of Transformers leave out the token that a GGUF file's texts begin with."""
        if self._bos is None or tokens[:1] == [self._bos]:
            return tokens
        return [self._bos, *tokens]


def _bos(metadata: dict[str, Any]) -> int | None:
    """The token that a GGUF file wants its texts to begin with; those of SentencePiece do if it is silent."""
    of_llama = metadata.get("tokenizer.ggml.model") == "llama"
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    wanted = metadata.get("tokenizer.ggml.add_bos_token", of_llama) is True
    return bos if wanted and isinstance(bos, int) else None


def _added_at_the_end(tokenizer: Any) -> list[int]:
    """Tokens that are put behind every text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    ends = (at + len(plain) for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[next(ends, len(whole)) :]
