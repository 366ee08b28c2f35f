"""How programs other than ours load the llama.cpp backend: what to paste, and the variables it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..config import SparseKConfig
from .llama_cpp import backend_path

_PREFIX: Final = "SPARSEK_"
_EXAMPLE: Final = f"{_PREFIX}TOP_K=64"
_FOR_GPUS: Final = ("select", "tile")  # fields that the backend has no use for
_NATIVE: Final = "GGML_BACKEND_PATH={path} {example} {program}"
_LLAMA_CPP_PYTHON: Final = """\
import os, llama_cpp
os.environ["SPARSEK_TOP_K"] = "64"
assert llama_cpp.llama_cpp._lib.ggml_backend_load(b"{path}"), "refused: stderr says why"
llm = llama_cpp.Llama("model.gguf", n_ctx=8192, flash_attn=True)"""
_XLLAMACPP: Final = """\
import ctypes, os, pathlib, xllamacpp
os.environ["SPARSEK_TOP_K"] = "64"
(library,) = pathlib.Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
assert ctypes.CDLL(str(library)).ggml_backend_load(b"{path}"), "refused: stderr says why"
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = "model.gguf", 8192
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = xllamacpp.Server(params)
print(server.handle_completions({{"prompt": "Once upon a time", "max_tokens": 16}}))"""
_NODE: Final = """\
process.env.GGML_BACKEND_PATH = "{path}"
process.env.SPARSEK_TOP_K = "64"
const {{getLlama}} = await import("node-llama-cpp")
const llama = await getLlama({{gpu: false}})
const model = await llama.loadModel({{modelPath: "model.gguf"}})
const context = await model.createContext({{contextSize: 8192}})"""
_PROGRAMS: Final = {
    "llama-server": "llama-server -m model.gguf",
    "llama-completion": "llama-completion -m model.gguf -f prompt.txt",
    "llama-bench": "llama-bench -m model.gguf -p 8192",
    # They read the variable when a device is named, and only then.
    "llama-server and others whose backends are built in": "llama-server -dev SPARSEK -m model.gguf",
}
_HOSTS: Final = {
    **{
        host: _NATIVE.format(path="{path}", example=_EXAMPLE, program=program)
        for host, program in _PROGRAMS.items()
    },
    "node-llama-cpp": _NODE,
    "llama-cpp-python": _LLAMA_CPP_PYTHON,
    "xllamacpp": _XLLAMACPP,
}


def installed_backend() -> Path:
    """The backend's file. Raises FileNotFoundError when the package was built without it."""
    path = backend_path()
    if not path.is_file():
        raise FileNotFoundError(f"the package was built without the llama.cpp backend: there is no {path}")
    return path


def instructions(path: Path) -> dict[str, str]:
    """Host: the lines that load the backend at `path`, keep 64 keys and have flash attention on."""
    return {host: lines.format(path=path) for host, lines in _HOSTS.items()}


def variables() -> dict[str, str]:
    """Environment variable that the backend reads: its default."""
    named = {name.rpartition(".")[2]: value for name, value in SparseKConfig().to_gguf_metadata().items()}
    defaults = {
        _PREFIX + name.upper(): str(value).removesuffix(",")
        for name, value in named.items()
        if name not in _FOR_GPUS
    }
    return {**defaults, f"{_PREFIX}CONFIG": "none", f"{_PREFIX}STATS": "0"}
