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


def test_everything_exported_is_there() -> None:
    import sparsek

    assert sorted(sparsek.__all__) == sparsek.__all__
    assert all(hasattr(sparsek, name) for name in sparsek.__all__)
    assert sparsek.__version__
