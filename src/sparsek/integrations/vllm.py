"""Sparse-K in vLLM, unmodified: a plug-in that vLLM finds by itself.

    pip install '.[vllm]'
    vllm serve MODEL --attention-backend CUSTOM        # or SPARSEK, where vLLM takes names (since 0.32)

This module is what vLLM imports in each of its processes, also for users who do not ask for Sparse-K: it
loads nothing, and changes nothing for them. The attention is in vllm_backend.py, and what differs between the
host's own backends in vllm_cuda.py and vllm_cpu.py.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, Final

NAMES: Final = ("CUSTOM", "SPARSEK")  # by which users ask for it
_log = logging.getLogger("vllm.plugins.sparsek")
_HERE: Final = __name__.rpartition(".")[0]


def register() -> None:
    """The entry point in vLLM's group `vllm.general_plugins`. May be called again."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        if find_spec("vllm") is not None:
            _warn(error)
        return
    names = AttentionBackendEnum.__members__
    custom, own = NAMES
    path = f"{_HERE}.vllm_cuda.Backend"
    if custom in names:
        register_backend(AttentionBackendEnum.CUSTOM, path)
    if hasattr(AttentionBackendEnum, "register"):  # it takes names of one's own
        if own not in names:
            register_backend(own, path)
        # A process that vLLM starts may unpickle its configuration before it loads plug-ins.
        AttentionBackendEnum[own].__reduce_ex__ = lambda _protocol: (_own, ())
    if "CPU_ATTN" in names:
        # On the CPU vLLM has one backend, whatever is asked for. What takes its place is that backend itself,
        # unless Sparse-K was asked for.
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.vllm_cpu.Backend")


def _own() -> Any:
    """vLLM's member for the name of our own, as it is unpickled."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[NAMES[1]]


def _warn(error: ImportError) -> None:
    """Of a vLLM that takes no attention from outside, or in a way that we do not know."""
    from .vllm_versions import tried

    _log.warning(
        "Sparse-K cannot be used in this vLLM, which takes no attention from outside as it expects: %s. "
        "It works with %s, and %s",
        error,
        tried("cuda"),
        tried("cpu"),
    )
