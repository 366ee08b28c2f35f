"""llama.cpp's C interface for tests, what the engine does not need of it, and some layers of a real model."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int8, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from sparsek import SparseKConfig
from sparsek.engines import llama_api as api
from sparsek.engines.model_file import embedded_model
from sparsek.integrations import llama_cpp as integration

from ..tiny_gguf import finish

Logits = np.ndarray[Any, np.dtype[np.float32]]

KEEP_ALL = SparseKConfig.pure(2**31 - 1)


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_add": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_max": (c_int32, [c_void_p, c_int32]),
    "llama_state_get_size": (c_size_t, [c_void_p]),
    "llama_state_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t]),
    "llama_state_set_data": (c_size_t, [c_void_p, c_void_p, c_size_t]),
}


class Host:
    """A model in the host, with the Sparse-K backend loaded."""

    def __init__(self, model: Path) -> None:
        self.lib = api.library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        integration.keep_log(self.lib.llama_log_set)
        integration.load_backend(self.lib)
        self.model = self.lib.llama_model_load_from_file(
            str(model).encode(), self.lib.llama_model_default_params()
        )
        assert self.model
        self._vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self._vocab)
        self.layers = self.lib.llama_model_n_layer(self.model)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, False)
        return list(tokens[:count])

    def __del__(self) -> None:
        self.lib.llama_model_free(self.model)


class Context:
    """A context of the host with flash attention; `config` None leaves attention to the host. One thread, for
    threads that wait for each other are slow where other processes want the same cores. Everything else
    goes into llama.cpp's parameters by its name there."""

    def __init__(
        self, host: Host, config: SparseKConfig | None, tokens: int = 1024, **parameters: Any
    ) -> None:
        self.host, self.config, self.lib = host, config, host.lib
        integration.configure(config)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = tokens, 1, 1
        params.flash_attn_type = api.FLASH_ATTENTION[True]
        for name, value in parameters.items():
            setattr(params, name, value)
        self.value = self.lib.llama_init_from_model(host.model, params)
        assert self.value

    def extend(self, tokens: Sequence[int], sequence: int = 0, last: int | None = None) -> Logits:
        """Append tokens to a sequence, in one batch. Logits [T, V], of the `last` tokens where given."""
        return self.extend_all({sequence: tokens}, last=last)[sequence]

    def extend_all(self, parts: Mapping[int, Sequence[int]], *, last: int | None = None) -> dict[int, Logits]:
        """Append tokens to several sequences, in one batch. Logits by sequence."""
        flat = [
            (token, self._end(sequence) + i, sequence)
            for sequence, part in parts.items()
            for i, token in enumerate(part)
        ]
        n = len(flat)
        rows = n if last is None else last
        wanted = [i >= n - rows for i in range(n)]
        ids = [(c_int32 * 1)(sequence) for _, _, sequence in flat]
        batch = api.Batch(
            n,
            (c_int32 * n)(*(token for token, _, _ in flat)),
            None,
            (c_int32 * n)(*(position for _, position, _ in flat)),
            (c_int32 * n)(*[1] * n),
            ctypes.cast((POINTER(c_int32) * n)(*(ctypes.cast(i, POINTER(c_int32)) for i in ids)), c_void_p),
            (c_int8 * n)(*wanted),
        )
        integration.configure(self.config)  # the settings are the process's: another context may have its own
        assert self.lib.llama_decode(self.value, batch) == 0
        self.lib.llama_synchronize(self.value)
        scores = self.lib.llama_get_logits(self.value)
        logits = np.ctypeslib.as_array(scores, (rows, self.host.vocabulary)).copy()
        owner = np.array([sequence for _, _, sequence in flat])[n - rows :]
        return {sequence: logits[owner == sequence] for sequence in parts}

    def remove(self, sequence: int, start: int, stop: int = -1) -> None:
        removed: bool = self.lib.llama_memory_seq_rm(self._memory, sequence, start, stop)
        assert removed

    def copy(self, source: int, target: int) -> None:
        self.lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def shift(self, sequence: int, start: int, by: int) -> None:
        self.lib.llama_memory_seq_add(self._memory, sequence, start, -1, by)

    def state(self) -> bytes:
        size = self.lib.llama_state_get_size(self.value)
        data = ctypes.create_string_buffer(size)
        assert self.lib.llama_state_get_data(self.value, data, size) == size
        return data.raw

    def restore(self, state: bytes) -> None:
        assert self.lib.llama_state_set_data(self.value, state, len(state)) == len(state)

    @property
    def _memory(self) -> Any:
        return self.lib.llama_get_memory(self.value)

    def _end(self, sequence: int) -> int:
        return int(self.lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def __del__(self) -> None:
        self.lib.llama_free(self.value)


def write_float_model(file: Path, layers: int) -> None:
    """The first layers of the embedded model in float32. The embedded model itself has 4-bit weights, whose
    products are chaotic: a change in the last bit of attention moves logits by 1."""
    import gguf

    reader = gguf.GGUFReader(embedded_model())
    writer = gguf.GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = layers if field.name == "llama.block_count" else field.contents()
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(block) < layers:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    finish(writer)
