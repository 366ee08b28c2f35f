"""Signs of life in a log, which is no terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from sparsek.cli import main, progress

from .. import tiny_gguf


def test_lines_come_after_a_while_and_not_too_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress("eval", 8000) as advance:
        for seconds, steps in ((4, 100), (10, 100), (15, 600), (16, 600), (3700, 6600)):
            now = 100.0 + seconds
            advance(steps)
    assert capsys.readouterr().err.splitlines() == [
        "eval: 800 of 8000, 0:00:15",
        "eval: 8000 of 8000, 1:01:40",
    ]


def test_what_a_step_says_is_a_line_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("tune", 3) as advance:
        advance()
        advance(said="K 8")
    assert capsys.readouterr().err == "tune: 2 of 3, 0:00:00, K 8\n"


def test_tune_says_each_point_that_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_gguf.llama().write(tmp_path / "a.gguf"))
    call = ["tune", "-m", model, "--context", "128", "--max-kl", "1", "--min-context", "0", "--threads", "1"]
    assert main(call) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.split(",")[0].split(" of ")[0] for line in lines] == [
        f"tune: {i}" for i in range(1, len(lines) + 1)
    ]
    first = r"tune: 1 of \d+, 0:00:\d\d, one K, K = \d+: \d+ keys, KL \d\.\d{4} ± \d\.\d{4}"
    assert re.fullmatch(first, lines[0])
    assert any(", layer 1 alone, K = 8: " in line for line in lines)
