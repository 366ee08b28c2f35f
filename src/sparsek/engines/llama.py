"""The engine `llama`: llama.cpp, unmodified, from the package xllamacpp."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from ..config import SparseKConfig
from ..integrations import llama_cpp as integration
from ..integrations.observers import Observer
from . import llama_api as api
from .base import Part
from .gguf_model import read_model
from .llama_context import BATCH, Context
from .llama_model import LlamaModel
from .llama_text import Tokenizer
from .model_file import find_model


class LlamaEngine:
    """See `base.Engine`. On the CPU; flash attention is on, which is the faster of llama.cpp's two ways."""

    name = "llama"
    device = "cpu"
    sparse_layers = None
    n_devices = 1

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
        files = read_model(path)
        self.model_config = SparseKConfig.from_gguf_metadata(files.metadata)
        self.generation_goes_on = False
        self._flash_attention, self._rope_scale = flash_attention, rope_scale
        self.dense = f"flash attention {'on' if flash_attention else 'off'}"
        self._threads = threads or integration.num_threads()
        self._model = LlamaModel(files)
        self._tokenizer = Tokenizer(self._model)
        lib, value = self._model.lib, self._model.value
        self.version = lib.ggml_version().decode()
        self.model = files.name
        self.num_layers = lib.llama_model_n_layer(value)
        self.num_heads = lib.llama_model_n_head(value)
        self.head_size = int(
            files.of_model("attention.key_length")
            or (files.of_model("embedding_length") or 0) // max(1, self.num_heads)
        )
        self.num_parameters = lib.llama_model_n_params(value)
        self.context_length = int(lib.llama_model_n_ctx_train(value) * rope_scale)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        return self._tokenizer.encode_chat(text)

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        return self._tokenizer.pieces(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.pieces(tokens)).decode(errors="replace")

    def prompt(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[tuple[int, float]]:
        context = self._new_context(len(tokens) + 1, config)
        for i in range(0, len(tokens), BATCH):
            part, start = tokens[i : i + BATCH], time.perf_counter()
            context.submit(part)
            seconds = time.perf_counter() - start
            context.best()  # is finite
            yield len(part), seconds

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        tokens = depth or self.encode("The")[:1]  # generation begins from something
        context = self._new_context(len(tokens) + count + 1, config)
        context.submit(tokens)
        first, go_back = context.best(), context.way_back()

        def once() -> float:
            go_back()
            token, start = first, time.perf_counter()
            for _ in range(count):
                context.submit([token])
                token = context.best()
            return time.perf_counter() - start

        return once

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        context = self._new_context(len(tokens) + count + 1, config)
        given: Sequence[int] = tokens
        for _ in range(count):
            context.submit(given)
            token = context.best()
            if self._tokenizer.ends(token):
                return
            yield token
            given = [token]

    def observed(
        self, observer: Observer, layers: Container[int] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return integration.observed(observer, layers)

    def operations(self) -> dict[str, int]:
        counts = integration.counts()
        of_host = self._model.passes * self._attention - counts.sparse - counts.dense
        return {"sparse": counts.sparse, "dense": counts.dense, "host": of_host}

    def logits(self, parts: Sequence[Part]) -> Iterator[Any]:
        import torch

        sparse = next((part.config for part in parts if part.config is not None), None)
        context = self._new_context(sum(len(part.tokens) for part in parts) + 1, sparse)
        for part in parts:
            context.use(part.config)
            step = part.step or BATCH
            for start in range(0, len(part.tokens), step):
                tokens = part.tokens[start : start + step]
                wanted = range(-start % part.scored, len(tokens), part.scored) if part.scored else range(0)
                context.submit(tokens, wanted)
                if wanted:
                    yield torch.from_numpy(context.logits(len(wanted)))

    @cached_property
    def _attention(self) -> int:
        """Attention operations of a pass: one for each layer that attends, not for all in a hybrid model."""
        count = ctypes.c_int64()
        ask, data = integration.attention_counter(count)
        self._new_context(1, None, cb_eval=ask, cb_eval_user_data=data).submit([0])  # of any token
        self._model.passes -= 1
        return count.value

    def _new_context(self, tokens: int, config: SparseKConfig | None, **parameters: Any) -> Context:
        if config is not None:
            config.check_layers(self.num_layers)
        if self._rope_scale != 1.0:
            parameters["rope_scaling_type"] = api.LINEAR_ROPE_SCALING
            parameters["rope_freq_scale"] = 1.0 / self._rope_scale
        threads = {"n_threads": self._threads, "n_threads_batch": self._threads}
        flash_attention = api.FLASH_ATTENTION[self._flash_attention or config is not None]
        return Context(self._model, tokens, config, flash_attn_type=flash_attention, **threads, **parameters)
