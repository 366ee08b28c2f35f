"""The engine `llama`: llama.cpp, unmodified, from the package xllamacpp."""

from __future__ import annotations

import contextlib
import ctypes
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Final

import numpy as np

from ..config import SparseKConfig
from ..integrations import llama_cpp as integration
from ..policy import fixed
from . import llama_api as api
from .base import Observer, Part
from .gguf_header import read_header
from .model_file import find_model

_BATCH: Final = 512  # tokens handed over at once, between which Ctrl-C is obeyed


class LlamaEngine:
    """See `base.Engine`. On the CPU; flash attention is on, which is the faster of llama.cpp's two ways."""

    name = "llama"
    device = "cpu"

    def __init__(
        self,
        model: str | None,
        *,
        threads: int | None = None,
        flash_attention: bool = True,
        rope_scale: float = 1.0,
    ) -> None:
        self.path = path = find_model(model)
        if not path.is_file():
            raise ValueError(f"the engine llama needs a GGUF file: {path}")
        metadata = read_header(path).metadata
        self.model_config = SparseKConfig.from_gguf_metadata(metadata)
        self.generation_goes_on = False
        self._lib = lib = api.library()
        self._flash_attention, self._rope_scale = flash_attention, rope_scale
        self.dense = f"flash attention {'on' if flash_attention else 'off'}"
        integration.keep_log(lib.llama_log_set)
        integration.load_backend(lib)
        self._threads = threads or integration.num_threads()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}: {integration.last_error()}")
        weakref.finalize(
            self, lib.llama_model_free, self._model
        ).atexit = False  # contexts may be there still
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.version = lib.ggml_version().decode()
        self.model = path.stem
        self.num_layers = lib.llama_model_n_layer(self._model)
        self.num_heads = lib.llama_model_n_head(self._model)
        of_model = {name.partition(".")[2]: value for name, value in metadata.items()}
        self.head_size = int(
            of_model.get("attention.key_length")
            or of_model.get("embedding_length", 0) // max(1, self.num_heads)
        )
        self.num_parameters = lib.llama_model_n_params(self._model)
        self.context_length = int(lib.llama_model_n_ctx_train(self._model) * rope_scale)
        self._vocabulary = lib.llama_vocab_n_tokens(self._vocab)
        self._operations = 0

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, special)
        return list(tokens[:count])

    def encode_chat(self, text: str) -> list[int]:
        template = self._lib.llama_model_chat_template(self._model, None)
        if template is None:
            return self.encode(text)
        message = api.ChatMessage(b"user", text.encode())
        room = ctypes.create_string_buffer(2 * len(text.encode()) + 4096)
        length = self._lib.llama_chat_apply_template(
            template, ctypes.byref(message), 1, True, room, len(room)
        )
        return self.encode(room.raw[:length].decode(), special=True) if length > 0 else self.encode(text)

    def decode(self, tokens: list[int]) -> str:
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(32 * len(tokens) + 64)
        length = self._lib.llama_detokenize(self._vocab, given, len(tokens), room, len(room), True, False)
        return room.raw[: max(0, length)].decode(errors="replace")

    def prompt(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[tuple[int, float]]:
        context = self._new_context(len(tokens) + 1, config)
        for i in range(0, len(tokens), _BATCH):
            part, start = tokens[i : i + _BATCH], time.perf_counter()
            self._submit(context, part)
            yield len(part), time.perf_counter() - start

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        tokens = depth or self.encode("The")[:1]  # generation begins from something
        context = self._new_context(len(tokens) + count + 1, config)
        first = self._append(context, tokens)

        def once() -> float:
            # The context lives as long as this function.
            memory = self._lib.llama_get_memory(context.value)
            self._lib.llama_memory_seq_rm(memory, -1, len(tokens), -1)
            token, start = first, time.perf_counter()
            for _ in range(count):
                token = self._append(context, [token])
            return time.perf_counter() - start

        return once

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        context = self._new_context(len(tokens) + count + 1, config)
        given: Sequence[int] = tokens
        for _ in range(count):
            token = self._append(context, given)
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            given = [token]

    def observed(
        self, observer: Observer, layers: Container[int] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return integration.observed(observer, layers)

    def operations(self) -> dict[str, int]:
        counts = integration.counts()
        taken = counts.sparse + counts.dense
        return {"sparse": counts.sparse, "dense": counts.dense, "host": self._operations - taken}

    def logits(self, parts: Sequence[Part]) -> Iterator[Any]:
        import torch

        sparse = next((part.config for part in parts if part.config is not None), None)
        context = self._new_context(sum(len(part.tokens) for part in parts) + 1, sparse)
        for part in parts:
            context.use(part.config)
            step = part.step or _BATCH
            for start in range(0, len(part.tokens), step):
                tokens = part.tokens[start : start + step]
                wanted = range(-start % part.scored, len(tokens), part.scored) if part.scored else range(0)
                self._submit(context, tokens, wanted)
                if wanted:
                    rows = self._lib.llama_get_logits(context.value)
                    shape = (len(wanted), self._vocabulary)
                    yield torch.from_numpy(np.ctypeslib.as_array(rows, shape=shape).copy())

    def _append(self, context: _Context, tokens: Sequence[int]) -> int:
        """Process tokens; the most likely next one."""
        self._submit(context, tokens)
        scores = self._lib.llama_get_logits_ith(context.value, -1)
        return int(np.ctypeslib.as_array(scores, shape=(self._vocabulary,)).argmax())

    def _submit(self, context: _Context, tokens: Sequence[int], scored: Sequence[int] = ()) -> None:
        """Process tokens; logits of those with the numbers `scored`, or else of the last of each batch."""
        integration.configure(context.config)  # another context may have had its turn
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            wanted = (ctypes.c_int8 * len(part))()
            for i in scored or [len(part) - 1]:
                wanted[i] = 1
            batch = api.Batch(len(part), (ctypes.c_int32 * len(part))(*part), None, None, None, None, wanted)
            status = self._lib.llama_decode(context.value, batch)
            self._operations += self.num_layers
            if status != 0:
                raise RuntimeError(f"llama.cpp cannot decode ({status}): {integration.last_error()}")
        self._lib.llama_synchronize(context.value)

    def _new_context(self, tokens: int, config: SparseKConfig | None) -> _Context:
        if config is not None:
            config.check_layers(self.num_layers)
        integration.configure(config)
        params = self._lib.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = api.FLASH_ATTENTION[self._flash_attention or config is not None]
        if self._rope_scale != 1.0:
            params.rope_scaling_type = api.LINEAR_ROPE_SCALING
            params.rope_freq_scale = 1.0 / self._rope_scale
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(
                f"llama.cpp cannot make a context of {tokens} tokens: {integration.last_error()}"
            )
        return _Context(self, context, config, tokens)


class _Context:
    """A context of llama.cpp for so many tokens, freed when nothing refers to it any more; the model lives at
    least as long."""

    def __init__(self, engine: LlamaEngine, value: int, config: SparseKConfig | None, tokens: int) -> None:
        self._engine, self.value, self._tokens = engine, value, tokens
        self.use(config)

    def use(self, config: SparseKConfig | None) -> None:
        """From now on. A prompt comes in batches, but its "auto" is that of the whole."""
        self.config = config and fixed(config, self._tokens)

    def __del__(self) -> None:
        self._engine._lib.llama_free(self.value)
