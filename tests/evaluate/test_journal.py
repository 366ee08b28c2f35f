from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsek.evaluate import journal
from sparsek.evaluate.journal import Journal

WORK = {"model": "m", "context": 64}


def must_not_run() -> None:
    raise AssertionError("this was finished before")


def test_finished_parts_are_not_made_again(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    first = Journal(file, WORK)
    assert first.get("a", lambda: [1, 2.5]) == [1, 2.5]
    second = Journal(file, WORK)
    assert second.get("a", must_not_run) == [1, 2.5]
    assert second.get("b", lambda: None) is None
    assert Journal(file, WORK).get("b", must_not_run) is None


def test_a_line_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    journal = Journal(file, WORK)
    journal.get("a", lambda: 1)
    journal.get("b", lambda: 2)
    file.write_bytes(file.read_bytes()[:-5])
    again = Journal(file, WORK)
    assert again.get("a", must_not_run) == 1
    assert not again.has("b")
    again.get("b", lambda: 3)
    assert Journal(file, WORK).get("b", must_not_run) == 3


def test_without_a_path_nothing_is_written() -> None:
    journal = Journal(None, WORK)
    assert journal.get("a", lambda: 1) == 1
    assert journal.get("a", must_not_run) == 1


def test_other_work_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    Journal(file, WORK)
    with pytest.raises(ValueError, match="its context was 64 and is now 65"):
        Journal(file, {**WORK, "context": 65})


@pytest.mark.parametrize("old", ['"result": 1.5', '"key": "a"', '"checksum": "'])
def test_a_result_that_something_else_has_changed_is_refused(tmp_path: Path, old: str) -> None:
    file = tmp_path / "j.jsonl"
    Journal(file, WORK).get("a", lambda: 1.5)
    text = file.read_text()
    assert old in text
    file.write_text(
        text.replace(old, old.replace("1.5", "NaN").replace('"a"', '"b"').replace('": "', '": "0'))
    )
    with pytest.raises(ValueError, match="or damaged"):
        Journal(file, WORK)


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="not an ordinary file"):
            Journal(path, WORK)


@pytest.mark.parametrize(
    "content",
    ["a text\n", "[1]\n", "[" * 10_000 + "\n", '{"work": null}\n', '{"key": 1}\n', '{"work": {}}\n[]\n'],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match="not a file to resume from"):
        Journal(file, WORK)
    assert file.read_text() == content


def test_names_are_the_same_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a C locale Python has the bytes of a name one by one."""
    engine: Any = SimpleNamespace(name="e", version="1", device="cpu", model="é", path=tmp_path)
    for name in ("é.gguf 12 34", "\udcc3\udca9.gguf 12 34"):
        monkeypatch.setattr(journal, "fingerprint", lambda _, name=name: name)
        Journal.of(tmp_path / "j", engine, "text")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    kept = Journal(tmp_path / "j", WORK)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        kept.get("a", lambda: 1)
    assert caught.value.filename == str(tmp_path / "j")
