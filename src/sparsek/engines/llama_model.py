"""A model in llama.cpp: loading it, or only its description, and whether it continues texts."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from ..integrations import llama_cpp as integration
from . import llama_api as api
from .gguf_model import GgufModel, does_not_generate
from .text import shown_name

_logger = logging.getLogger(__name__)


class LlamaModel:
    """A loaded model, freed when nothing refers to it any more.

    Attributes:
        value: llama.cpp's. lib: llama.cpp. files: what it was loaded from.
        vocabulary: tokens that it knows. passes: how often it was run, all contexts together.

    Raises:
        ValueError: llama.cpp cannot load it, or it does not continue texts.
        ImportError: xllamacpp has another interface, or does not take the backend.
    """

    def __init__(self, files: GgufModel, *, weights: bool = True) -> None:
        """`weights`: False to load all else, in no time, to see what is wrong with it."""
        self.files, self.passes = files, 0
        self.lib = _library(shown_name(str(files.path)))
        params = self.lib.llama_model_default_params()
        if not weights:
            params.no_alloc, params.load_mode = True, api.WITHOUT_MMAP
        integration.take_errors()
        self.value: Any = self.lib.llama_model_load_from_file(os.fsencode(files.path), params)
        if not self.value:
            raise ValueError(f"llama.cpp cannot load {files.path}: {integration.cause()}")
        weakref.finalize(
            self, self.lib.llama_model_free, self.value
        ).atexit = False  # contexts may be there still
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.value)))
        why = self._why_not()
        if why is not None:
            raise does_not_generate(files, why)

    @property
    def has_state(self) -> bool:
        """Whether some layers keep a state, from which the last tokens cannot be taken out again."""
        lib = self.lib
        return bool(lib.llama_model_is_recurrent(self.value) or lib.llama_model_is_hybrid(self.value))

    def _why_not(self) -> str | None:
        """Why it does not continue texts."""
        lib = self.lib
        if lib.llama_model_has_encoder(self.value):
            return "it has an encoder"
        if not lib.llama_model_has_decoder(self.value):
            return "it has no decoder"
        if lib.llama_model_is_diffusion(self.value):
            return "it generates by diffusion"
        if lib.llama_vocab_type(lib.llama_model_get_vocab(self.value)) == api.NO_VOCABULARY:
            return "it has no vocabulary"
        return self._why_not_in_context()

    def _why_not_in_context(self) -> str | None:
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 8
        context = self.lib.llama_init_from_model(self.value, params)
        if not context:
            raise ValueError(f"llama.cpp cannot run {self.files.path}: {integration.cause()}")
        try:
            if self.lib.llama_pooling_type(context) != api.NO_POOLING:
                return "it makes embeddings of them"
            if not self.lib.llama_get_causal_attn(context):
                return "its attention is not causal"
            return None if self.lib.llama_get_memory(context) else "it has no cache"
        finally:
            self.lib.llama_free(context)


def _library(model: str) -> Any:
    """llama.cpp, with Sparse-K in it, and what it says kept: its log, shown where ours is, and last words."""
    lib = api.library()
    integration.keep_log(lib.llama_log_set, show=_logger.isEnabledFor(logging.DEBUG))
    integration.keep_last_words(lib.ggml_set_abort_callback, model)
    integration.load_backend(lib)
    return lib
