from __future__ import annotations

import subprocess
import sys

import torch

from sparsek.bench.environment import environment


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
