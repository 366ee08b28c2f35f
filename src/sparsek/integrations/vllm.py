"""Sparse-K in vLLM, unmodified: a plug-in that vLLM finds by itself.

    pip install '.[vllm]'
    vllm serve MODEL --attention-backend CUSTOM

This module is what vLLM imports in each of its processes, also for users who do not ask for Sparse-K: it
loads nothing, and changes nothing that they would see. The attention is in vllm_backend.py, and what differs
between the host's own backends in vllm_cuda.py and vllm_cpu.py.
"""

from __future__ import annotations

import logging
from typing import Final

_log = logging.getLogger(__name__)
_HERE: Final = __name__.rpartition(".")[0]


def register() -> None:
    """The entry point in vLLM's group `vllm.general_plugins`. May be called again."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        _log.debug("this vLLM takes no attention from outside: %s", error)
        return
    names = AttentionBackendEnum.__members__
    if "CUSTOM" in names:
        register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.vllm_cuda.Backend")
    if "CPU_ATTN" in names:
        # On the CPU vLLM has one backend, whatever is asked for. What takes its place is that backend itself,
        # unless CUSTOM was asked for.
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.vllm_cpu.Backend")
