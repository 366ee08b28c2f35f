"""Before anything imports Triton: without a GPU its kernels run in the interpreter, which it decides then."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="All architectures of Transformers in test_architectures.py, not a selection.",
    )
