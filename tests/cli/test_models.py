"""Models that cannot be used as asked: exit code 2 and one line, in every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from sparsek.cli import main

from .. import tiny_gguf
from ..tiny_gguf import TinyModel
from ..waiting import HANGS
from .conftest import Sparsek

SPARSE = ["-k", "8", "--min-context", "0", "--threads", "1"]  # threads wait where other processes run
LLAMA: dict[str, list[str]] = {
    "run": ["-p", "x", *SPARSE],
    "eval": ["--context", "128", *SPARSE],
    "bench": ["-p", "16", "-n", "2", "-r", "1", *SPARSE],
    "tune": [
        "--engine",
        "llama",
        "--context",
        "128",
        "--max-kl",
        "1",
        "--min-context",
        "0",
        "--threads",
        "1",
    ],
    "serve": ["--port", "0"],
}
TRANSFORMERS: dict[str, list[str]] = {
    "run": ["--engine", "transformers", "-p", "x"],
    "tune": ["--context", "128", "--max-kl", "1", "--min-context", "0", "--threads", "1"],
    "report": ["--context", "128", "--lengths", "64", *SPARSE],
}
COMMANDS = [*LLAMA.items(), *TRANSFORMERS.items()]


def named(value: Any) -> str:
    return value.__name__ if callable(value) else value if isinstance(value, str) else ""


@pytest.mark.parametrize(("command", "options"), COMMANDS, ids=named)
@pytest.mark.parametrize("model", [tiny_gguf.t5, tiny_gguf.bert], ids=named)
def test_models_that_do_not_continue_texts(
    sparsek_fails: Sparsek, tmp_path: Path, model: Callable[[], TinyModel], command: str, options: list[str]
) -> None:
    file = model().write(tmp_path / "model.gguf")
    line = sparsek_fails(command, "-m", str(file), *options)
    assert "the model does not continue texts, it" in line
    assert line.endswith(str(file))


@pytest.mark.parametrize(("command", "options"), LLAMA.items(), ids=named)
def test_what_llama_cpp_finds_out(
    sparsek_fails: Sparsek, tmp_path: Path, command: str, options: list[str]
) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.ggml.model"] = "no_vocab"
    file = model.write(tmp_path / "model.gguf")
    assert "does not continue texts, it has no vocabulary" in sparsek_fails(
        command, "-m", str(file), *options
    )
    model = tiny_gguf.llama()
    del model.tensors["blk.1.attn_v.weight"]
    model.write(file)
    line = sparsek_fails(command, "-m", str(file), *options)
    assert f"llama.cpp cannot load {file}: tensor 'blk.1.attn_v.weight' not found" in line


def test_logits_that_are_not_finite(sparsek_fails: Sparsek, tmp_path: Path) -> None:
    model = tiny_gguf.llama()
    model.tensors["blk.1.attn_v.weight"][1, 1] = np.nan
    file = str(model.write(tmp_path / "damaged.gguf"))
    told = "sparsek: the logits of damaged are not finite: are its weights damaged?"
    for command in ("run", "eval", "bench", "tune"):
        assert sparsek_fails(command, "-m", file, *LLAMA[command]) == told
    asked = [sys.executable, "-m", "sparsek", "serve", "-m", file, *LLAMA["serve"]]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=HANGS)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{told}\n")


def test_where_llama_cpp_breaks_off(tmp_path: Path) -> None:
    """It ends the process itself when a model contradicts itself in some ways."""
    model = tiny_gguf.llama()
    model.of_model["expert_count"] = 1000
    file = str(model.write(tmp_path / "model.gguf"))
    for command in ("run", "serve"):
        asked = [sys.executable, "-m", "sparsek", command, "-m", file, *LLAMA[command]]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=HANGS)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"sparsek: llama.cpp breaks off with {file}, which may be damaged: ")


@pytest.mark.parametrize(("command", "options"), COMMANDS, ids=named)
def test_shards_that_cannot_be_used(
    sparsek_fails: Sparsek, tmp_path: Path, command: str, options: list[str]
) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3)
    line = sparsek_fails(command, "-m", str(files[1]), *options)
    assert "this is shard 2 of 3, give the first, big-00001-of-00003.gguf" in line
    if "transformers" in options or (command, options) in TRANSFORMERS.items():
        line = sparsek_fails(command, "-m", str(files[0]), *options)
        assert "Transformers does not read a GGUF model in shards" in line
    files[2].unlink()
    assert f"shard 3 of 3 is missing: {files[2]}" in sparsek_fails(command, "-m", str(files[0]), *options)


@pytest.mark.parametrize("first_empty", [False, True])
def test_shards_are_a_model(sparsek: Sparsek, tmp_path: Path, first_empty: bool) -> None:
    first = tiny_gguf.llama().write_shards(tmp_path, "big", 3, first_empty=first_empty)[0]
    for command in ("run", "eval", "bench", "tune"):
        printed = sparsek(command, "-m", str(first), *LLAMA[command])
        assert ("| big " in printed) == (command in ("eval", "bench"))


def test_a_journal_is_of_all_shards(sparsek: Sparsek, sparsek_fails: Sparsek, tmp_path: Path) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3)
    arguments = ["eval", "-m", str(files[0]), *LLAMA["eval"], "--resume", str(tmp_path / "journal")]
    sparsek(*arguments)
    files[2].write_bytes(files[2].read_bytes() + b"\0")
    assert "is of other work, its model file was" in sparsek_fails(*arguments)


def test_debug_shows_the_log_of_llama_cpp(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf.llama()
    del model.tensors["blk.1.attn_v.weight"]
    file = str(model.write(tmp_path / "model.gguf"))
    told = f"sparsek: llama.cpp cannot load {file}: tensor 'blk.1.attn_v.weight' not found"
    assert main(["run", "-p", "x", "-m", file]) == 2
    assert capfd.readouterr().err.splitlines() == [told]
    assert main(["run", "-p", "x", "-m", file, "--debug"]) == 2
    *log, last = capfd.readouterr().err.splitlines()
    assert last == told
    assert any("llama_model_loader:" in line for line in log)
    assert any("error loading model" in line for line in log)


@pytest.mark.parametrize(
    ("name", "locale"),
    [
        (b"caf\xe9.gguf", {}),
        ("café.gguf".encode(), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_names_of_any_bytes(tmp_path: Path, name: bytes, locale: dict[str, str]) -> None:
    file = tmp_path / os.fsdecode(name)
    tiny_gguf.llama().write(tmp_path / "a.gguf").rename(file)
    asked = [sys.executable, "-m", "sparsek", "bench", "-m", str(file), *LLAMA["bench"]]
    done = subprocess.run(
        asked, capture_output=True, env={**os.environ, **locale}, check=False, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    shown = file.stem.replace("\udce9", "\\xe9")
    assert [line.split()[1] for line in done.stdout.decode().splitlines()[2:]] == [shown] * 2


# ---- Attention that is not Sparse-K's


def test_no_ratio_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tiny_gguf.mamba().write(tmp_path / "mamba.gguf"))
    options = ["-p", "16,32", "-n", "2", "-r", "2", *SPARSE, "-k", "0,8", "-o", "json"]
    assert main(["bench", "-m", file, *options]) == 0
    printed = capsys.readouterr()
    assert "note: no ratio, for mamba has no attention that Sparse-K could compute" in printed.err
    records = json.loads(printed.out)
    assert [record["top_k"] for record in records] == [0, 8] * 3
    assert {(record["speedup"], record["verified_rows"]) for record in records} == {(None, 0)}
    assert {sum(record["operations"].values()) for record in records} == {0}


def test_eval_says_that_there_is_no_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tiny_gguf.mamba().write(tmp_path / "mamba.gguf"))
    assert main(["eval", "-m", file, *LLAMA["eval"]]) == 0
    assert (
        capsys.readouterr().err
        == "note: mamba has no attention that Sparse-K could compute: K changes nothing\n"
    )


def test_nothing_to_tune_without_attention(sparsek_fails: Sparsek, tmp_path: Path) -> None:
    file = str(tiny_gguf.mamba().write(tmp_path / "mamba.gguf"))
    assert "nothing to tune, for mamba has no attention" in sparsek_fails("tune", "-m", file, *LLAMA["tune"])


def test_a_hybrid_model_is_compared_where_it_attends(sparsek: Sparsek, tmp_path: Path) -> None:
    file = str(tiny_gguf.lfm2().write(tmp_path / "lfm2.gguf"))
    options = [
        "-p",
        "64",
        "-n",
        "8",
        "-d",
        "0,40",
        "-r",
        "2",
        "-k",
        "0,8",
        "--min-context",
        "0",
        "-o",
        "json",
    ]
    records = json.loads(sparsek("bench", "-m", file, *options))
    assert [sum(r["operations"].values()) for r in records] == [2, 2, 16, 16, 16, 16]
    for record in records:
        sparse = record["top_k"] == 8
        assert (record["speedup"] is not None) == sparse
        assert (record["verified_rows"] > 0) == sparse
        assert (record["operations"]["host"] == 0) == sparse


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_what_run_prints_is_what_the_model_says(sparsek: Sparsek, tmp_path: Path, engine: str) -> None:
    said = "é !=".encode()
    model = tiny_gguf.says_in_a_circle(list(said))
    model.fields["tokenizer.ggml.pre"] = "llama-bpe"
    file = str(model.write(tmp_path / "model.gguf"))
    asked = ["run", "-m", file, "--raw", "-p", "=", "--engine", engine, "--threads", "1", "-n"]
    assert sparsek(*asked, str(2 * len(said))) == "é !=é !=\n"
    assert sparsek(*asked, "1") == "\n"  # half of a character is held back
