"""A context of llama.cpp: a sequence of tokens, and what the model says of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..config import SparseKConfig
from ..integrations import llama_cpp as integration
from . import llama_api as api
from .gguf_model import not_finite
from .llama_model import LlamaModel

BATCH: Final = 512  # tokens handed over at once, between which Ctrl-C is obeyed
_NO_ROOM: Final = 1  # llama_decode's answer

Logits = np.ndarray[Any, np.dtype[np.float32]]


class Context:
    """For so many tokens; freed when nothing refers to it any more. The model lives at least as long.

    Args:
        config: what attention keeps, None for llama.cpp's own; see `use`.
        parameters: by their names in llama.cpp.
    """

    def __init__(
        self, model: LlamaModel, tokens: int, config: SparseKConfig | None, **parameters: Any
    ) -> None:
        self._model, self._lib, self._tokens = model, model.lib, tokens
        self._value: Any = None
        self._length = 0  # of the sequence so far
        self.use(config)
        params = self._lib.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = params.n_ubatch = BATCH
        params.swa_full = True  # or what was outside of a window would be gone when tokens are taken out
        for name, value in parameters.items():
            setattr(params, name, value)
        integration.configure(self._config)
        integration.take_errors()
        self._value = self._lib.llama_init_from_model(model.value, params)
        if not self._value:
            raise ValueError(f"llama.cpp cannot make a context of {tokens} tokens: {integration.cause()}")
        integration.flash_attention_is_decided()  # it is among the parameters

    def use(self, config: SparseKConfig | None) -> None:
        """From now on."""
        self._config = config

    def submit(self, tokens: Sequence[int], scored: Sequence[int] = ()) -> None:
        """Process tokens; logits of those with the numbers `scored`, or else of the last of each batch.

        Raises:
            ValueError: llama.cpp fails.
        """
        integration.configure(self._config)  # another context may have had its turn
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            wanted = (ctypes.c_int8 * len(part))()
            for i in scored or [len(part) - 1]:
                wanted[i] = 1
            batch = api.Batch(len(part), (ctypes.c_int32 * len(part))(*part), None, None, None, None, wanted)
            self._check_decoded(self._lib.llama_decode(self._value, batch))
            self._model.passes += 1
            self._length += len(part)
        self._lib.llama_synchronize(self._value)

    def logits(self, count: int) -> Logits:
        """Of the `count` tokens that were scored, a copy, [count, vocabulary].

        Raises:
            ValueError: some are not finite.
        """
        rows: Logits = self._finite(self._lib.llama_get_logits(self._value), count).copy()
        return rows

    def best(self) -> int:
        """The most likely token after the last.

        Raises:
            ValueError: some of its logits are not finite.
        """
        return int(self._finite(self._lib.llama_get_logits_ith(self._value, -1), 1).argmax())

    def way_back(self) -> Callable[[], None]:
        """What takes the context back to the tokens that it has now, whenever it is called."""
        length = self._length
        state = self._state() if self._model.has_state else None

        def back() -> None:
            if state is None:
                self._take_out(length)
            else:
                self._put_in(state)
            self._length = length

        return back

    def _take_out(self, start: int) -> None:
        """The tokens from `start` on."""
        memory = self._lib.llama_get_memory(self._value)
        if not self._lib.llama_memory_seq_rm(memory, 0, start, -1):
            raise self._failed(f"cannot go back to the first {start}")

    def _state(self) -> Any:
        """All that the model remembers of the sequence."""
        size = self._lib.llama_state_seq_get_size(self._value, 0)
        state = ctypes.create_string_buffer(size)
        if size == 0 or self._lib.llama_state_seq_get_data(self._value, state, size, 0) != size:
            raise self._failed("cannot keep its state")
        return state

    def _put_in(self, state: Any) -> None:
        if self._lib.llama_state_seq_set_data(self._value, state, len(state), 0) == 0:
            raise self._failed("cannot take back its state")

    def _check_decoded(self, status: int) -> None:
        if status == _NO_ROOM:
            raise self._failed("has no room for more")
        if status != 0:
            raise self._failed(f"cannot go on ({status})")

    def _finite(self, address: Any, count: int) -> Logits:
        """Rows of logits at the address, which may be null."""
        if not address:
            raise self._failed("gives no logits")
        rows: Logits = np.ctypeslib.as_array(address, shape=(count, self._model.vocabulary))
        if not np.isfinite(rows).all():
            self._free()
            raise not_finite(self._model.files.name)
        return rows

    def _failed(self, what: str) -> ValueError:
        name, at = self._model.files.name, f"after {self._length} tokens of {self._tokens}"
        cause = integration.cause()
        self._free()
        return ValueError(f"llama.cpp {what} {at}, with {name}: {cause}")

    def _free(self) -> None:
        """At once where something failed, so that what llama.cpp logs of it comes before the error."""
        if self._value:
            self._lib.llama_free(self._value)
        self._value = None

    def __del__(self) -> None:
        self._free()
