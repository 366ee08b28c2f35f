"""GGUF headers: what the package `gguf` reads from them, and damage of every kind."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from sparsek.engines.gguf_header import read_header
from sparsek.engines.model_file import embedded_model

KIND = gguf.GGUFValueType


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(file, "test")
    writer.add_key_value("a.words", ["one", "", "drei"], KIND.ARRAY, sub_type=KIND.STRING)
    writer.add_key_value("a.lists", [[1, 2], [3]], KIND.ARRAY, sub_type=KIND.ARRAY)
    writer.add_key_value("a.flags", [True, False], KIND.ARRAY, sub_type=KIND.BOOL)
    writer.add_key_value("a.text", "Grüße", KIND.STRING)
    writer.add_key_value("a.number", -(2**40), KIND.INT64)
    writer.add_key_value("a.real", 0.25, KIND.FLOAT64)
    writer.add_tensor("w", np.zeros((3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_fields(small: Path) -> None:
    header = read_header(small)
    assert header.metadata == {
        "general.architecture": "test",
        "a.words": None,
        "a.lists": None,
        "a.flags": None,
        "a.text": "Grüße",
        "a.number": -(2**40),
        "a.real": 0.25,
    }
    assert header.data_offset + 3 * 5 * 4 <= small.stat().st_size


@pytest.mark.model
def test_a_real_model_reads_as_the_package_reads_it() -> None:
    header, reader = read_header(embedded_model()), gguf.GGUFReader(embedded_model())
    assert header.data_offset == reader.data_offset
    expected = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(expected)
    for name, field in expected.items():
        if field.types[0] != KIND.ARRAY:
            assert header.metadata[name] == field.contents()
        assert header.spans[name] == (field.offset, field.offset + sum(part.nbytes for part in field.parts))


def test_a_file_cut_anywhere_is_refused(small: Path) -> None:
    data = small.read_bytes()
    end = read_header(small).data_offset + 3 * 5 * 4
    for size in range(0, end, 7):
        small.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"GGUF file .*small\.gguf"):
            read_header(small)


def test_damage_is_told_or_harmless(small: Path) -> None:
    data, chance = small.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data) - 60)
            damaged[at] = chance.choice((0, 1, 9, 127, 255, chance.randrange(256)))
        small.write_bytes(damaged)
        try:
            read_header(small)
        except ValueError:
            refused += 1
    assert 500 < refused < 3000


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, struct.pack("<I", 9), "has the unknown version 9"),
        (4, struct.pack(">I", 3), "is for machines of another byte order"),
        (8, struct.pack("<Q", 2**63), "damaged or truncated"),
        (16, struct.pack("<Q", 2**63), "damaged or truncated"),
    ],
)
def test_what_is_wrong_is_said(small: Path, at: int, value: bytes, message: str) -> None:
    data = small.read_bytes()
    small.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(ValueError, match=message):
        read_header(small)
