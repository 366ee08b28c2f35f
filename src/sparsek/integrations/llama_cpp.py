"""Sparse-K in unmodified llama.cpp: the backend libggml-sparsek.so, which the host loads by itself.

    library = ctypes.CDLL(path of the library that holds ggml)
    load_backend(library)                      # once, before the first model
    configure(SparseKConfig(top_k=64))         # when it is to be in force

From then on the host gives its flash attention operations to Sparse-K; flash attention must be on. Programs
that are not Python load the backend with GGML_BACKEND_PATH and read SPARSEK_TOP_K and its like.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from ctypes import c_char, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from .. import _core
from ..config import SparseKConfig
from ..policy import Rule
from ..problem import Problem

# observer(layer, problem, output), the output [B, H, Tq, Dv]
Observer = Callable[[int, Problem, Any], None]

_FORMATS: Final = {0: np.float32, 1: np.float16, 30: np.uint16}  # bfloat16 as its bits
_BFLOAT16: Final = 30
_Q8_0: Final = 8
_WHERE: Final = re.compile(r"^(?:\w+: |error loading model: )+")  # functions of the host


class Tensor(ctypes.Structure):
    """ggml's tensor; sizes and strides (in bytes) begin with the axis that changes fastest."""


Tensor._fields_ = [
    ("type", c_int),
    ("buffer", c_void_p),
    ("size", c_int64 * 4),
    ("stride", c_size_t * 4),
    ("op", c_int),
    ("op_params", ctypes.c_float * 16),
    ("flags", c_int),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", c_void_p),
    ("view_offset", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
]
_OBSERVER: Final = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(Tensor),
    c_int64,
    ctypes.POINTER(c_int64),
    ctypes.c_float,
    ctypes.POINTER(ctypes.c_float),
)


@dataclass(frozen=True)
class Counts:
    """Attention operations so far: with Sparse-K, with our dense kernel, and given back to the host."""

    sparse: int
    dense: int
    by_host: int


def backend_path() -> Path:
    """The backend's file, which comes with the package."""
    return Path(_core.__file__).with_name("libggml-sparsek.so")


def load_backend(host: ctypes.CDLL) -> None:
    """Load the backend into the llama.cpp that `host` holds. May be called again.

    Raises:
        FileNotFoundError: the package was built without the backend.
        ImportError: the host refused it; the reason is on stderr, for it is the host who asked.
    """
    _library()  # is missing in words of ours
    path = backend_path()
    host.ggml_backend_load.restype = ctypes.c_void_p
    host.ggml_backend_load.argtypes = [ctypes.c_char_p]
    if not host.ggml_backend_load(os.fsencode(path)):
        raise ImportError("llama.cpp did not load the Sparse-K backend: the line above says why")


def configure(config: SparseKConfig | None) -> None:
    """What every operation from now on keeps, in all contexts; None leaves attention to the host.

    Raises:
        ValueError: the backend does not take the configuration.
    """
    library = _library()
    library.sparsek_configure.restype = ctypes.c_char_p
    library.sparsek_configure.argtypes = [ctypes.c_char_p]
    problem = library.sparsek_configure(_json(config))
    if problem is not None:
        raise ValueError(problem.decode())


def flash_attention_is_decided() -> None:
    """The contexts that were made so far were made with flash attention on or off. With "auto", which the
    backend takes for granted else, a context's first graph of up to 256 tokens is left to the host, for it
    may be llama.cpp's question who attends."""
    _library().sparsek_decided()


@cache
def _json(config: SparseKConfig | None) -> bytes:
    return b'{"top_k": 0}' if config is None else config.to_json().encode()


def keep_log(set_log: Callable[[Any, Any], Any], *, show: bool = False) -> None:
    """Keep the errors in the host's log for `take_errors`; `show` writes all of it to stderr, which is silent
    otherwise. `set_log`: the host's llama_log_set."""
    set_log(ctypes.cast(_library().sparsek_log, c_void_p), c_void_p(1) if show else None)


def keep_last_words(set_abort: Callable[[Any], Any], model: str) -> None:
    """Where the host breaks off, as it does with some models that contradict themselves, end the process with
    one line that names `model`, and exit code 2. `set_abort`: the host's ggml_set_abort_callback."""
    library = _library()
    library.sparsek_name_model.restype = None
    library.sparsek_name_model(" ".join(model.split()).encode())
    set_abort(ctypes.cast(library.sparsek_break_off, c_void_p))


def take_errors() -> str:
    """The errors in the host's log since the last call, after `keep_log`; one a line."""
    library = _library()
    library.sparsek_take_errors.restype = ctypes.c_char_p
    return str(library.sparsek_take_errors().decode(errors="replace"))


def cause() -> str:
    """Why the host failed, in its own words: the first error since `take_errors`, which those after it only
    pass on."""
    lines = [line.strip() for line in take_errors().splitlines()]
    first = next((line for line in lines if line), "no reason given")
    return _WHERE.sub("", first)


def attention_counter(count: c_int64) -> tuple[c_void_p, c_void_p]:
    """For the host's `cb_eval` and `cb_eval_user_data`: counts a context's attention operations in `count`,
    which must live as long."""
    callback, data = _library().sparsek_count_attention, ctypes.pointer(count)
    return ctypes.cast(callback, c_void_p), ctypes.cast(data, c_void_p)


def num_threads() -> int:
    """How many threads to give the host."""
    return _core.num_threads()


def counts() -> Counts:
    """See `Counts`."""
    values = (ctypes.c_int64 * 3)()
    _library().sparsek_counts(values)
    return Counts(*values)


@contextlib.contextmanager
def observed(observer: Observer, layers: Container[int] | None = None) -> Iterator[None]:
    """Call `observer` after every attention operation within the block, of all layers or those named: for
    measuring and verifying. What it raises is raised at the end of the block."""
    errors: list[BaseException] = []

    def seen(op: Any, layer: int, rule: Any, min_share: float, slopes: Any) -> None:
        if errors or (layers is not None and layer not in layers):
            return
        try:
            problem, out = _problem(op.contents, rule, min_share, slopes)
            observer(layer, problem, out)
        except BaseException as error:  # it cannot pass through the host
            errors.append(error)

    callback = _OBSERVER(seen)
    _library().sparsek_observe(callback)
    try:
        yield
    finally:
        _library().sparsek_observe(None)
    if errors:
        raise errors[0]


def _problem(op: Tensor, rule: Any, min_share: float, slopes: Any) -> tuple[Problem, Any]:
    """An operation's inputs, copied, and its output. `slopes`: of ALiBi, one a head, or null."""
    q, k, v = (_array(op.src[i].contents) for i in range(3))
    mask = None
    if op.src[3]:
        mask = _array(op.src[3].contents)[:, :, : q.shape[2]]
        if not np.isin(mask, (0, -np.inf)).all():
            heads = np.ctypeslib.as_array(slopes, (q.shape[1],)) if slopes else np.ones(1, np.float32)
            mask = mask * heads[:, None, None]
        else:
            mask = mask == 0
        mask = np.broadcast_to(mask, (*mask.shape[:2], q.shape[2], k.shape[2]))
    scale, _, softcap = op.op_params[:3]
    top_k, sinks, window, stride, tail = rule[:5]
    problem = Problem(
        q=q,
        k=k,
        v=v,
        mask=mask,
        is_causal=False,
        first_position=k.shape[2],  # what a row may see is in the mask alone
        scale=float(scale),
        softcap=float(softcap) or None,
        rule=Rule(top_k, sinks, window, stride, "centroid" if tail else "none", min_share=min_share),
    )
    return problem, _array(op).swapaxes(1, 2)


def _array(t: Tensor) -> np.ndarray[Any, Any]:
    """A copy in float32, axes from the slowest to the fastest."""
    size, stride = t.size[::-1], t.stride[::-1]
    if t.type == _Q8_0:
        from gguf import GGMLQuantizationType, dequantize

        blocks = _view(t.data, np.uint8, [*size[:3], size[3] // 32, 34], [*stride, 1])
        return np.asarray(dequantize(blocks.reshape(*size[:3], -1), GGMLQuantizationType.Q8_0))
    dtype = _FORMATS[t.type]
    x = _view(t.data, dtype, size, stride)
    if t.type == _BFLOAT16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def _view(address: int, dtype: Any, size: Sequence[int], stride: Sequence[int]) -> np.ndarray[Any, Any]:
    """Memory as an array; strides in bytes."""
    count = np.dtype(dtype).itemsize + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address)).view(dtype)
    return np.lib.stride_tricks.as_strided(memory, size, stride)


@cache
def _library() -> ctypes.CDLL:
    path = backend_path()
    if not path.exists():
        raise FileNotFoundError(f"the llama.cpp backend is missing: {path}")
    return ctypes.CDLL(str(path))
