"""`sparsek ggml-backend`: what it prints loads the backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsek import SparseKConfig
from sparsek.engines.model_file import embedded_model
from sparsek.integrations import llama_cpp_hosts as library

from ..waiting import HANGS
from .conftest import Sparsek


def test_path_alone(sparsek: Sparsek) -> None:
    (line,) = sparsek("ggml-backend", "--path").splitlines()
    assert Path(line).is_file()


def test_every_host_and_variable(sparsek: Sparsek) -> None:
    text = sparsek("ggml-backend")
    path = sparsek("ggml-backend", "--path").strip()
    for host in library.instructions(Path(path)):
        assert f"\n{host}:\n" in text
    assert text.count(path) == 1 + len(library.instructions(Path(path)))
    defaults = dict(line.split() for line in text.splitlines() if line.startswith("  SPARSEK_"))
    assert defaults["SPARSEK_TOP_K"] == "auto"
    assert defaults["SPARSEK_MIN_CONTEXT"] == str(SparseKConfig().min_context)
    assert {"SPARSEK_DENSE_LAYERS", "SPARSEK_CONFIG", "SPARSEK_STATS"} < set(defaults)


@pytest.mark.model
def test_the_lines_for_xllamacpp_work() -> None:
    pytest.importorskip("xllamacpp")
    lines = library.instructions(library.installed_backend())["xllamacpp"]
    code = lines.replace("model.gguf", str(embedded_model()))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loaded SPARSEK backend" in done.stderr
    assert "Once upon a time" not in done.stdout
    assert "text" in done.stdout


def test_the_backend_takes_its_defaults_as_they_are_printed() -> None:
    pytest.importorskip("xllamacpp")
    path = library.installed_backend()
    variables = {name: value for name, value in library.variables().items() if name != "SPARSEK_CONFIG"}
    code = "from sparsek.engines import llama_api; from sparsek.integrations import llama_cpp as l; "
    code += "l.load_backend(llama_api.library())"
    for changed, code_expected in ({}, 0), ({"SPARSEK_TAIL": "cut"}, 1):
        environment = {**os.environ, **variables, **changed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert done.returncode == code_expected, (path, done.stderr)


def test_missing_backend(sparsek_fails: Sparsek, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "backend_path", lambda: Path("/no/backend.so"))
    assert "built without the llama.cpp backend: there is no /no/backend.so" in sparsek_fails("ggml-backend")
