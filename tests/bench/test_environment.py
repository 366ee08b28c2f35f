from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsek.bench import environment as module
from sparsek.bench.environment import environment, package_version


def test_pytorch_is_not_loaded_for_it() -> None:
    code = (
        "import sys; from sparsek.bench.environment import environment; found = environment(); "
        "sys.exit('torch' in sys.modules or 'gpu' in found)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_gpu_is_told_where_pytorch_uses_one() -> None:
    found = environment()
    gpu = {"gpu", "gpu_memory_gib", "cuda", "cudnn"}
    assert gpu & set(found) == (gpu if torch.cuda.is_available() else set())


def broken(*_args: object) -> None:
    raise RuntimeError("found another cuDNN than PyTorch was compiled against")


def test_what_cannot_be_read_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    found = environment()
    assert [found[name] for name in ("gpu", "gpu_memory_gib", "cudnn")] == ["a card", None, None]


def test_a_machine_that_tells_nothing_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu_name", "version", "_cores", "_memory_gib"):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    module._machine.cache_clear()
    try:
        found = environment()
    finally:
        module._machine.cache_clear()
    assert [found[name] for name in ("cpu", "cores", "memory_gib")] == [None, None, None]
    assert "gpu" not in found
    assert package_version("torch") is None
