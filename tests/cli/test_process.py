"""The command as a process of its own: what it writes to, where it is interrupted, and in which locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPARSEK = [sys.executable, "-m", "sparsek"]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ATTENTION = ["bench-attention", "--tokens", "8", "-r", "1", "--baseline", "none", "--min-context", "0"]


def run(*arguments: str, locale: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **(locale or {})}
    return subprocess.run([*SPARSEK, *arguments], capture_output=True, check=False, env=environment)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["run", "--help"], [*ATTENTION, "-o", "csv"], ATTENTION])
def test_standard_output_that_is_full_is_named(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*SPARSEK, *arguments], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"sparsek: No space left on device: standard output\n"
    assert done.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_error_that_cannot_be_told_is_still_one() -> None:
    with open("/dev/full", "wb") as full:
        assert subprocess.run([*SPARSEK, "run"], stderr=full, check=False).returncode == 2


def test_a_c_locale_is_no_reason_to_fail() -> None:
    done = run("run", "-p", "x", "-m", "no/é±.gguf", locale=C_LOCALE)
    assert done.stderr.decode() == "sparsek: no such model: 'no/é±.gguf'\n"
    done = run(*ATTENTION, locale={**C_LOCALE, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0


def test_characters_that_a_locale_lacks_are_escaped(tmp_path: Path) -> None:
    """Names too; bytes that are no UTF-8 can be given as arguments on Linux alone."""
    place = tmp_path / os.fsdecode(b"caf\xe9 \xe2\x88\x92.gguf")
    for encoding, expected in (("utf-8", "caf\\xe9 −.gguf"), ("latin-1", "caf\\xe9 \\u2212.gguf")):
        done = run("run", "-p", "x", "-m", str(place), locale={"PYTHONIOENCODING": encoding})
        assert expected in done.stderr.decode(encoding)
        assert done.returncode == 2


@pytest.mark.parametrize("module", ["numpy", "importlib.metadata", "click", "sparsek.cli.eval", "torch"])
def test_ctrl_c_while_something_is_loaded_is_one_line(module: str) -> None:
    """The interrupt comes when the module is looked for."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["bin/sparsek", "eval", "--engine", "transformers"]
from sparsek.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stderr == b"sparsek: interrupted\n"
    assert done.returncode == 130


def test_ctrl_c_is_left_alone_in_other_programs() -> None:
    code = "import signal, sparsek; print(signal.getsignal(2) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stdout == b"True\n"
