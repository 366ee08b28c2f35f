"""Records are shown as soon as they are complete: what a run has measured is there when it is killed."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sparsek.cli import main
from sparsek.cli.output import Column, Records, Table

from .. import tiny_gguf

SPARSE = ["--min-context", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["-m", str(tiny_gguf.llama().write(tmp_path_factory.mktemp("model") / "tiny.gguf"))]


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Iterator[str]]:
    """The lines that a command shows while it runs; it is killed at the end of the block, before its own."""
    # Ours, not that of the shell: output to a pipe is held back until there is much of it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "sparsek", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        yield iter(process.stdout.readline, "")
    finally:
        ended = process.poll()
        process.kill()
        process.wait()
        process.stdout.close()
    assert ended is None, "it was over before it could be killed"
    assert process.returncode == -signal.SIGKILL


def commands(tiny: list[str]) -> dict[str, list[str]]:
    """Whose second record takes much longer than the first one."""
    return {
        "bench-attention": ["--tokens", "64,30000", "-k", "8", "-r", "9", *SPARSE],
        "bench": [*tiny, "-p", "64,4000", "-n", "0", "-k", "8", "-r", "200", *SPARSE],
    }


@pytest.mark.parametrize("name", ["bench-attention", "bench"])
def test_a_killed_run_has_shown_its_first_record(tiny: list[str], name: str) -> None:
    call = [name, *commands(tiny)[name], "-o"]
    with running(*call, "jsonl") as lines:
        record = json.loads(next(lines))
    assert record["config"]["top_k"] == 8
    assert record["environment"]["cpu"]
    with running(*call, "csv") as lines:
        (row,) = csv.DictReader([next(lines), next(lines)])
    assert row["top_k"] == "8"
    assert row["environment.cpu"] == record["environment"]["cpu"]
    with running(*call, "md") as lines:
        titles, rule, cells = (next(lines) for _ in range(3))
    assert len(titles) == len(rule) == len(cells)
    assert set(rule.strip()) == set("|-: ")
    assert "| 8 " in cells or " 8 |" in cells


def test_a_killed_eval_has_shown_its_records_and_what_was_retrieved(tiny: list[str]) -> None:
    call = ["eval", *tiny, "--context", "4096", "-k", ",".join(["8"] * 6), "--retrieval", *SPARSE]
    with running(*call, "-o", "jsonl") as lines:
        records = [json.loads(next(lines)) for _ in range(7)]
    assert [record["top_k"] for record in records] == [8] * 7
    assert records[5]["ppl"] > 0
    assert records[6]["task"] == "passkey"
    with running(*call) as lines:
        table = [next(lines) for _ in range(10)]
    assert table[0].startswith("| model | engine | text")
    assert table[8] == "\n"
    assert table[9].startswith("| task ")


def test_a_killed_tune_has_shown_its_first_point(tiny: list[str]) -> None:
    with running("tune", *tiny, "--context", "2048", "--max-kl", "0.1", *SPARSE) as lines:
        titles, _, cells = (next(lines) for _ in range(3))
    assert titles.startswith("| step ")
    assert cells.startswith("| one K ")
    assert len(cells) == len(titles)


def test_json_is_whole_or_not_at_all(tiny: list[str]) -> None:
    call = ["bench", *tiny, "-p", "16,9999", "-n", "0", "-k", "8", *SPARSE, "-o", "json"]
    command = [sys.executable, "-m", "sparsek", *call]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@dataclass(frozen=True)
class Measured:
    name: str
    used: int | list[int] | None
    samples: list[int]
    pair: tuple[float, float] | None
    config: dict[str, Any] | None
    environment: dict[str, Any] = field(default_factory=lambda: {"cpu": "x", "threads": 2})


ONE = Measured("a|b", [1, 2], [1], None, None)
TWO = Measured("a long name, with a comma", 7, [1, 2], (1.0, 2.0), {"top_k": 7})


def test_columns_of_csv_do_not_depend_on_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    for records in ([ONE, TWO], [TWO, ONE]):
        with Records("csv", []) as shown:
            for record in records:
                shown.add(record)
        header, *rows = csv.reader(capsys.readouterr().out.splitlines())
        assert header == ["name", "used", "config", "environment.cpu", "environment.threads"]
        texts = {"a|b": ["a|b", "", "", "x", "2"], TWO.name: [TWO.name, "7", '{"top_k":7}', "x", "2"]}
        assert rows == [texts[record.name] for record in records]


def test_a_table_is_as_wide_as_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table([Column("name", lambda r: r.name), Column("n", lambda r: str(r.used), 6, right=True)])
    table.add(ONE)
    table.add(TWO)
    assert capsys.readouterr().out.splitlines() == [
        "| name |      n |",
        "| ---- | -----: |",
        "| a\\|b | [1, 2] |",
        "| a long name, with a comma |      7 |",
    ]


def test_json_is_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    with Records("json", []):
        pass
    assert json.loads(capsys.readouterr().out) == []
    with Records("json", []) as shown:
        shown.add(ONE)
        assert capsys.readouterr().out == ""
    assert [record["samples"] for record in json.loads(capsys.readouterr().out)] == [[1]]


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="there are no terminals")
def test_rows_go_to_standard_output_and_the_bar_to_the_terminal() -> None:
    """Whatever rich does with a terminal that is standard error alone."""
    import pty

    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                shown.append(os.read(ours, 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    call = ["bench-attention", "--tokens", "64,80", "-k", "8", "-r", "2", *SPARSE, "-o", "jsonl"]
    command = [sys.executable, "-m", "sparsek", *call]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert [json.loads(line)["tokens"] for line in done.stdout.splitlines()] == [64, 80]
    assert b"bench-attention" in b"".join(shown)
    assert b"max_abs_err" not in b"".join(shown)


def test_eval_tells_what_is_known_after_each_window(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *tiny, "--context", "128", "--windows", "3", "-k", "8", *SPARSE]) == 0
    printed = capsys.readouterr()
    notes = [line for line in printed.err.splitlines() if line.startswith("note: after ")]
    assert [note.split(":")[1] for note in notes] == [f" after {n} of 3 windows, K 8" for n in (1, 2)]
    assert all(re.search(r": ratio \d\.\d{4} ± \d\.\d{4}, KL \d\.\d{4} ± \d\.\d{4}$", n) for n in notes)
