"""Before anything imports Triton: without a GPU its kernels run in the interpreter, which it decides then."""

from __future__ import annotations

import os
from importlib.util import find_spec

if find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
