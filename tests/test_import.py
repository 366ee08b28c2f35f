"""`import sparsek` is light: it loads no framework, no engine and no command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton", "gguf", "accelerate", "click", "rich", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import sparsek",
        "import numpy as np, sparsek; x = np.ones((1, 1, 70, 4)); "
        "sparsek.attention(x, x, x, config=sparsek.SparseKConfig.pure(3))",
    ],
    ids=["import", "attention on NumPy arrays"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_by(code)
    assert "sparsek" in loaded
    assert not loaded.intersection(HEAVY)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from sparsek.cli import main
sys.exit(main(%r))
"""


def without_torch(*command: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH % (list(command),)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.model
def test_llama_needs_no_torch_for_speed() -> None:
    assert "pp64" in without_torch("bench", "-p", "64", "-n", "0", "-r", "1").stdout


@pytest.mark.parametrize("command", ["eval", "tune", "bench-attention"])
def test_commands_say_how_torch_is_installed(command: str) -> None:
    done = without_torch(command)
    assert done.returncode == 2
    assert done.stderr.startswith("sparsek: torch is not installed: pip install '.[transformers]'")


def test_everything_exported_is_there() -> None:
    import sparsek

    assert sorted(sparsek.__all__) == sparsek.__all__
    assert all(hasattr(sparsek, name) for name in sparsek.__all__)
    assert sparsek.__version__
