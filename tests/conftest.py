"""What must hold before any test: Triton's kernels run in the interpreter where there is no GPU, which Triton
decides when it is imported, and the interpreter counts as a GPU does; and Ctrl-C reaches the processes that
tests start."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest

if find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

# A shell's background jobs ignore SIGINT, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from . import triton_interpreter

        triton_interpreter.mend()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="All architectures of Transformers in test_architectures.py, not a selection.",
    )
    parser.addoption("--docs", action="store_true", help="The long code blocks of README and docs too.")
    parser.addoption(
        "--hosts", metavar="NAMES", help="Programs with ggml in them, which are fetched: all, or names."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--docs"):
        for item in items:
            if item.get_closest_marker("docs"):
                item.add_marker(pytest.mark.skip(reason="make test-docs"))
