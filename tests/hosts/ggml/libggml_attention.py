"""ggml without a model: python libggml_attention.py TOKENS GENERATED

One attention operation of a whole prompt, of 9 heads over 3 for keys and values, on the first device that
takes it: as ggml's scheduler chooses, the CPU last. The "text" is read out of the last rows by a random
matrix, so that another attention gives another text. The backend of the variable GGML_BACKEND_PATH, if any,
is loaded first.
"""

import ctypes
import json
import os
import pathlib
import sys
import time
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

import libggml
import numpy as np

SIZE, HEADS, KV_HEADS = 64, 9, 3
F32, F16 = 0, 1  # ggml's numbers of types
CPU = 0  # and of a kind of device


class _Memory(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


def _open() -> list[ctypes.CDLL]:
    folder = pathlib.Path(libggml.__file__).parent
    names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
    return [ctypes.CDLL(str(next(folder.rglob(name))), ctypes.RTLD_GLOBAL) for name in names]


LIBRARIES = _open()


def ggml(name: str, result: object, *arguments: object) -> object:
    """A function of the library, whichever of its files it is in."""
    library = next(library for library in LIBRARIES if hasattr(library, name))
    function = library[name]
    function.restype, function.argtypes = result, arguments
    return function


def main(tokens: int, generated: int) -> None:
    if path := os.environ.get("GGML_BACKEND_PATH"):
        assert ggml("ggml_backend_load", c_void_p, c_char_p)(path.encode()), "refused"
    context = ggml("ggml_init", c_void_p, _Memory)(_Memory(1 << 30, None, False))
    random = np.random.default_rng(7)
    causal = np.triu(np.full((tokens, tokens), -np.inf, np.float16), 1)
    q, k, v, mask = (
        _tensor(context, values)
        for values in (
            2 * random.standard_normal((HEADS, tokens, SIZE), np.float32),
            random.standard_normal((KV_HEADS, tokens, SIZE), np.float32).astype(np.float16),
            random.standard_normal((KV_HEADS, tokens, SIZE), np.float32).astype(np.float16),
            causal[None],
        )
    )
    of = ggml("ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, *[c_float] * 3)
    attention = of(context, q, k, v, mask, SIZE**-0.5, 0, 0)
    graph = ggml("ggml_new_graph", c_void_p, c_void_p)(context)
    ggml("ggml_build_forward_expand", None, c_void_p, c_void_p)(graph, attention)
    backend = _first_that_takes(attention)
    start = time.perf_counter()
    assert ggml("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)(backend, graph) == 0
    seconds = time.perf_counter() - start
    rows = _data(attention, (tokens, HEADS * SIZE), c_float)[-generated:]
    letters = (rows @ random.standard_normal((HEADS * SIZE, 26), np.float32)).argmax(-1)
    print(json.dumps({"text": "".join(chr(97 + letter) for letter in letters), "prompt_s": seconds}))


def _first_that_takes(operation: object) -> object:
    registry_count = ggml("ggml_backend_dev_count", c_size_t)()
    at = ggml("ggml_backend_dev_get", c_void_p, c_size_t)
    kind = ggml("ggml_backend_dev_type", c_int, c_void_p)
    devices = sorted((at(i) for i in range(registry_count)), key=lambda device: kind(device) == CPU)
    # As a program does: backends of all devices are made before the first question.
    backends = [ggml("ggml_backend_dev_init", c_void_p, c_void_p, c_char_p)(d, None) for d in devices]
    takes = ggml("ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)
    return next(b for device, b in zip(devices, backends, strict=True) if takes(device, operation))


def _data(tensor: object, shape: tuple[int, ...], number: type) -> np.ndarray:
    address = ggml("ggml_get_data", c_void_p, c_void_p)(tensor)
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(number)), shape)


def _tensor(context: object, values: np.ndarray) -> object:
    """In memory of its own, axes from the last to the first, as ggml counts them."""
    sizes = (c_int64 * 4)(*values.shape[::-1], 1)
    new = ggml("ggml_new_tensor", c_void_p, c_void_p, c_int, c_int, ctypes.POINTER(c_int64))
    half = values.dtype == np.float16
    tensor = new(context, F16 if half else F32, 4, sizes)
    number = ctypes.c_uint16 if half else c_float
    _data(tensor, values.shape, number)[...] = values.view(np.uint16) if half else values
    return tensor


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
