"""`sparsek exec`: the program runs as Python runs it, and its models find Sparse-K by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from sparsek import SparseKConfig
from sparsek.integrations.transformers import enable

from ..integrations.tiny_models import llama
from .conftest import Sparsek

EXEC = [sys.executable, "-m", "sparsek", "exec"]

PROGRAM = """
import json, logging, signal, sys
from transformers import AttentionInterface

if __name__ == "__main__":
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "file": __file__, "handlers": logging.getLogger().handlers,
        "known": "sparsek" in AttentionInterface(),
        "interrupt": signal.getsignal(2) is signal.default_int_handler,
    }))
    print("to stderr", file=sys.stderr)
    sys.exit(7)
"""


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EXEC, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("")
    for name in ("program.py", "tool/__main__.py", "tool/part.py"):
        (tmp_path / name).write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "file", "path"),
    [
        (["program.py"], "program.py", "."),
        (["tool/part.py"], "tool/part.py", "tool"),
        (["-m", "tool"], "tool/__main__.py", "."),
        (["--pure", "-k", "9", "-m", "tool.part"], "tool/part.py", "."),
    ],
)
def test_the_program_runs_as_python_runs_it(folder: Path, arguments: list[str], file: str, path: str) -> None:
    """Its arguments are its own, whatever they are called."""
    own = ["-k", "5", "--debug", "-m", "sparsek", "--", "--help", "a b"]
    done = run(*arguments, *own, cwd=folder)
    assert (done.returncode, done.stderr) == (7, "to stderr\n")
    found = json.loads(done.stdout)
    assert found["argv"][1:] == own
    assert Path(folder, found["argv"][0]) == Path(folder, found["file"]) == folder / file
    assert Path(found["path"]) == (folder / path).resolve()
    assert (found["known"], found["interrupt"], found["handlers"]) == (True, True, [])


def test_what_it_raises_is_its_own(folder: Path) -> None:
    (folder / "program.py").write_text("raise ValueError('of the program')")
    done = run("program.py", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: of the program\n")


def test_a_signal_ends_it(folder: Path) -> None:
    (folder / "program.py").write_text("print('begins', flush=True); import time; time.sleep(60)")
    command = [*EXEC, "program.py"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert time.monotonic() - start < 20


# ---- K

LOADED = """
import sys
from transformers import AutoModelForCausalLM
from sparsek import SparseKConfig
from sparsek.integrations.transformers import current_config, enable
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sparsek")
print(current_config(model).to_json())
print(current_config(enable(model, SparseKConfig(7))).top_k)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that carries no K, and one that does."""
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "plain")
    enable(llama(), SparseKConfig(top_k=5)).save_pretrained(folder / "with-k")
    (folder / "config.json").write_text(SparseKConfig(top_k=3, sinks=1).to_json())
    (folder / "program.py").write_text(LOADED)
    return folder


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ([], "plain", SparseKConfig()),
        ([], "with-k", SparseKConfig(top_k=5)),
        (["-k", "9"], "with-k", SparseKConfig(top_k=9)),
        (["--min-context", "0"], "plain", SparseKConfig(min_context=0)),
        (["--config", "config.json", "--window", "2"], "with-k", SparseKConfig(3, sinks=1, window=2)),
        (["-k", "0"], "plain", SparseKConfig.pure(2**31 - 1)),
    ],
)
def test_which_k_a_model_has(models: Path, options: list[str], model: str, expected: Any) -> None:
    """That of the options, or else its own, or else the default; `enable` is over all."""
    done = run(*options, "program.py", model, cwd=models)
    assert done.returncode == 0, done.stderr
    config, enabled = done.stdout.splitlines()
    assert SparseKConfig.from_json(config) == expected
    assert enabled == "7"


# ---- What is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py"], "there is no script 'none.py' to run"),
        (["-m", "no_such_tool"], "there is no module 'no_such_tool' to run"),
        (["-m", "no.such.tool"], "there is no module 'no.such.tool' to run: No module named 'no'"),
        (["-m", "importlib"], "the package 'importlib' has no __main__ to run"),
    ],
)
def test_a_program_that_is_not_there(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"sparsek: {message}\n")


def test_wrong_options(sparsek_fails: Sparsek) -> None:
    assert "Missing argument 'PROGRAM'" in sparsek_fails("exec", "-m")
    assert "-k 1,2: exec takes one K" in sparsek_fails("exec", "-k", "1,2", "program.py")
    assert "sinks = -1" in sparsek_fails("exec", "--sinks", "-1", "program.py")
    assert "No such option" in sparsek_fails("exec", "--threads", "2", "program.py")
