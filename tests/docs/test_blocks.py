"""The code blocks of README and docs run, as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from sparsek.engines.model_file import embedded_model

from ..waiting import HANGS
from . import markdown
from .markdown import ROOT, Block

pytestmark = pytest.mark.model


def of(test: str) -> list[object]:
    runnable = [block for block in markdown.blocks() if block.language != "text"]
    return [pytest.param(block, id=block.name) for block in runnable if block.test == test]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the files that the pages speak of."""
    (tmp_path / "model.gguf").symlink_to(embedded_model())
    manual = "\n".join(topics.values())
    (tmp_path / "book.txt").write_text(manual[:60_000])
    (tmp_path / "chapter.txt").write_text(manual[:10_000])
    return tmp_path


def run(block: Block, folder: Path, programs: Path, **environment: str) -> None:
    """In `folder`, with the `programs` of one environment before all others."""
    if block.language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", block.code]
    else:
        command = [str(programs / "python"), "-c", block.code]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=8 * HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("block", of("quick"))
def test_quick(block: Block, folder: Path) -> None:
    run(block, folder, Path(sys.executable).parent)


@pytest.mark.docs
@pytest.mark.parametrize("block", of("long"))
def test_long(block: Block, folder: Path) -> None:
    run(block, folder, Path(sys.executable).parent)


@pytest.mark.docs
@pytest.mark.parametrize("block", of("clean"))
def test_installing(block: Block, tmp_path: Path) -> None:
    """In a new environment, with the versions that the project tests."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "new"], check=True)
    outside = {name: "" for name in os.environ if name.startswith(("SPARSEK_", "PYTHON"))}
    run(block, ROOT, tmp_path / "new" / "bin", PIP_CONSTRAINT=str(ROOT / "constraints.txt"), **outside)
