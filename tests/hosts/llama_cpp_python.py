"""llama-cpp-python, built from its source package, with the Sparse-K backend: `make test-llama-cpp-python`.

    python llama_cpp_python.py libggml-sparsek.so model.gguf sliding.gguf

The second model has two layers, the first of them with a sliding window of 512 tokens.

It needs nothing of the package sparsek: this is how a program uses the library alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pydoc_data.topics import topics

import llama_cpp

KEEP_ALL = b"""{"top_k": 2147483647, "sinks": 0, "window": 0, "tail": "none", "dense_layers": [],
                "min_context": 0}"""
SPARSE = b'{"top_k": 64, "min_context": 0}'
OFF = b'{"top_k": 0}'
BY_LENGTH = b'{"top_k": 64, "dense_layers": [], "min_context": 2048}'


class Backend:
    """The loaded backend: its settings and counts."""

    def __init__(self, path: str) -> None:
        load = llama_cpp.llama_cpp._lib.ggml_backend_load
        load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        if not load(path.encode()):
            sys.exit(f"llama-cpp-python {llama_cpp.__version__} did not load {path}")
        self._lib = ctypes.CDLL(path)
        self._lib.sparsek_configure.restype = ctypes.c_char_p

    def configure(self, settings: bytes) -> None:
        problem = self._lib.sparsek_configure(settings)
        assert problem is None, problem

    def counts(self) -> tuple[int, int, int]:
        """With Sparse-K, with our dense kernel, by the host."""
        values = (ctypes.c_int64 * 3)()
        self._lib.sparsek_counts(values)
        return values[0], values[1], values[2]


# A graph as the host shares it out: its parts, each a device's, and the operations that compute something.
Schedule = list[tuple[str, str, str]]


class Schedules:
    """All graphs that the host shared out, from its log."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._callback = llama_cpp.llama_log_callback(
            lambda _level, text, _: self._text.append(text.decode())
        )

    def of(self, model: str, tokens: list[int]) -> Schedule:
        """Of a context that is made, a prompt and a step. (device, operation, name), in order."""
        os.environ["GGML_SCHED_DEBUG"] = "2"
        llama = llama_cpp.Llama(model, n_ctx=1024, n_threads=2, flash_attn=True, verbose=False)
        self._text.clear()
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama.eval(tokens)
        llama.eval(tokens[:1])
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
        llama.close()
        del os.environ["GGML_SCHED_DEBUG"]
        parts = r"## SPLIT #\d+: (\w+) # (\d+) inputs|node #\s*\d+ \(\s*(\S+)\):\s+(.+?) \(.*?\) \[\s*(\w+)"
        schedule = []
        for device, inputs, operation, name, own in re.findall(parts, "".join(self._text)):
            schedule.append((device, "part", f"{inputs} copied") if device else (own, operation, name))
        return schedule


def check_schedules(backend_path: str, model: str, tokens: list[int]) -> Backend:
    """Beside the plain host's: with the backend nothing but attention goes to another device, and nothing is
    copied for it, though it takes operations that compute nothing too."""
    schedules = Schedules()
    plain = schedules.of(model, tokens)
    backend = Backend(backend_path)
    backend.configure(OFF)
    assert schedules.of(model, tokens) == plain
    backend.configure(KEEP_ALL)
    ours = schedules.of(model, tokens)
    attention = sum(operation.startswith("FLASH_ATTN") for _, operation, _ in plain)
    computed = [node for node in ours if node[1] != "part"]
    assert attention > 0
    assert [(o, n) for _, o, n in computed] == [(o, n) for _, o, n in plain if o != "part"]
    assert all(d.startswith("SPARS") == o.startswith("FLASH_ATTN") for d, o, _ in computed)
    parts = [node for node in ours if node[1] == "part"]
    assert {copied for _, _, copied in parts} == {"0 copied"}
    assert sum(device == "SPARSEK" for device, _, _ in parts) == attention
    # Before, between and after attention.
    assert len(parts) == 2 * attention + sum(node[1] == "part" for node in plain)
    print(f"scheduling:      {len(computed)} operations in {len(parts)} parts, {attention} of them attention")
    return backend


def generate(model: str, prompt: str | list[int], count: int) -> str:
    llama = llama_cpp.Llama(model, n_ctx=4096, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False)
    text: str = llama(prompt, max_tokens=count, temperature=0.0)["choices"][0]["text"]
    llama.close()
    return text


def sliding(backend: Backend, model: str) -> None:
    """Of 3000 tokens in batches of 512 the last three see 2048 or more, in the layer without a window."""
    backend.configure(BY_LENGTH)
    for whole in (True, False):
        before = backend.counts()
        llama = llama_cpp.Llama(
            model, n_ctx=4096, n_batch=512, flash_attn=True, swa_full=whole, verbose=False
        )
        llama.eval([1 + i % 200 for i in range(3000)])
        llama.close()
        counts = tuple(after - b for after, b in zip(backend.counts(), before, strict=True))
        print(f"sliding window:  swa_full {whole}, {counts}")
        assert counts == (3, 9, 0), counts


def main(backend_path: str, model: str, sliding_model: str) -> None:
    short = "The capital of France is"
    tokens = llama_cpp.Llama(model, vocab_only=True, verbose=False).tokenize(
        "\n".join(topics.values())[:20_000].encode()
    )[:2000]
    backend = check_schedules(backend_path, model, tokens[:600])

    backend.configure(OFF)
    before = backend.counts()
    expected = generate(model, short, 24)
    assert backend.counts() == before
    print(f"host:            {expected!r}")

    backend.configure(KEEP_ALL)
    kept = generate(model, short, 24)
    sparse, dense, by_host = backend.counts()
    print(f"keep everything: {kept!r}, {dense} operations")
    assert kept == expected
    assert dense > before[1]
    assert (sparse, by_host) == (0, 0)

    backend.configure(SPARSE)
    text = generate(model, tokens, 16)
    sparse, _, by_host = backend.counts()
    print(f"2000 tokens:     {text!r}, {sparse} operations")
    assert text.strip()
    assert sparse > 0
    assert by_host == 0

    sliding(backend, sliding_model)


if __name__ == "__main__":
    main(*sys.argv[1:])
