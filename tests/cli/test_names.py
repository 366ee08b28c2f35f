"""Names of models, texts and files that are no UTF-8, or that a table could take for a part of itself."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from .. import tiny_gguf
from .conftest import Sparsek

SPARSE = ["-k", "8", "--min-context", "0"]
SHOWN = {b"caf\xe9": "caf\\xe9", "a|b\nü".encode(): "a|b\nü"}  # as text that UTF-8 can hold
IN_A_TABLE = {b"caf\xe9": "caf\\xe9", "a|b\nü".encode(): "a\\|b\\nü"}


@dataclass(frozen=True)
class Named:
    """A folder with a model and a text of that name."""

    name: bytes
    folder: Path

    def __call__(self, ending: str) -> str:
        return str(self.folder / os.fsdecode(self.name + ending.encode()))


@pytest.fixture(scope="module", params=SHOWN, ids=repr)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Named:
    made = Named(request.param, tmp_path_factory.mktemp("names"))
    try:
        Path(made(".txt")).write_text("Some words that come again and again. " * 40)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    tiny_gguf.llama().write(made.folder / "model.gguf").rename(made(".gguf"))
    return made


def inputs(named: Named) -> list[str]:
    return ["-m", named(".gguf"), "--text", named(".txt")]


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_records_and_tables(sparsek: Sparsek, named: Named, engine: str) -> None:
    call = ["eval", *inputs(named), "--engine", engine, "--context", "64", *SPARSE]
    call += ["--resume", named(f".{engine}.journal")]
    shown, cell = SHOWN[named.name], IN_A_TABLE[named.name]
    table = sparsek(*call).splitlines()
    assert len(table) == 3
    assert table[2].startswith(f"| {cell} ")
    assert f"| {cell}.txt |" in table[2]
    for record in (
        json.loads(sparsek(*call, "-o", "json"))[0],
        json.loads(sparsek(*call, "-o", "jsonl")),
        *csv.DictReader(io.StringIO(sparsek(*call, "-o", "csv"), newline="")),
    ):
        assert (record["model"], record["text"]) == (shown, f"{shown}.txt")


def test_speed(sparsek: Sparsek, named: Named) -> None:
    table = sparsek("bench", *inputs(named), "-p", "16", "-n", "0", "-r", "1", *SPARSE).splitlines()
    assert [line.startswith(f"| {IN_A_TABLE[named.name]} |") for line in table] == [False, False, True]


def test_files_that_are_written_and_read_again(sparsek: Sparsek, named: Named) -> None:
    call = ["tune", *inputs(named), "--context", "128", "--max-kl", "1", "--min-context", "0"]
    said = sparsek(*call, "-o", named(".json"), "--records", named(".records"), "--resume", named(".tuned"))
    assert said.endswith(f"wrote {named.folder}/{SHOWN[named.name]}.json\n")
    assert json.loads(Path(named(".records")).read_text())["model"] == SHOWN[named.name]
    sparsek("run", "-m", named(".gguf"), "-f", named(".txt"), "--config", named(".json"), "-n", "2")


def test_the_page(sparsek: Sparsek, named: Named) -> None:
    pytest.importorskip("matplotlib")
    call = ["report", *inputs(named), "--context", "64", "--lengths", "64", "--sentence", "the", *SPARSE]
    said = sparsek(*call, "-o", named(".html"), "--images", named(".images"))
    shown = SHOWN[named.name]
    assert said.startswith(f"wrote {named.folder}/{shown}.html\n")
    page = Path(named(".html")).read_text(encoding="utf-8")
    assert f"<title>Sparse-K on {shown}</title>" in page
    assert f"{named.folder}/{shown}.txt" in page  # in the command that repeats it
    assert f"tokens of {shown}.txt" in page


@pytest.mark.parametrize("option", ["-m", "-f", "--config"])
def test_files_that_are_not_there(sparsek_fails: Sparsek, named: Named, option: str) -> None:
    missing = f"{named.folder}/no {os.fsdecode(named.name)}"
    call = {"-p": "x", option: missing}
    line = sparsek_fails("run", *(word for pair in call.items() for word in pair))
    assert SHOWN[named.name].partition("\n")[0] in line
