"""`sparsek annotate`: the setting goes into a copy of the model, and nothing else changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from sparsek import SparseKConfig
from sparsek.engines import annotate as library
from sparsek.engines.base import open_engine
from sparsek.engines.gguf_header import read_header
from sparsek.engines.model_file import embedded_model

from .. import tiny_gguf
from .conftest import Sparsek

FIELDS: dict[str, tuple[Any, Any, Any]] = {
    "test.text": ("Grüße", gguf.GGUFValueType.STRING, None),
    "test.no_text": ("", gguf.GGUFValueType.STRING, None),
    "test.number": (-7, gguf.GGUFValueType.INT8, None),
    "test.large": (2**63 + 1, gguf.GGUFValueType.UINT64, None),
    "test.real": (0.1, gguf.GGUFValueType.FLOAT32, None),
    "test.exact": (0.1, gguf.GGUFValueType.FLOAT64, None),
    "test.flag": (True, gguf.GGUFValueType.BOOL, None),
    "test.words": (["one", "", "drei"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
    "test.numbers": ([3, 1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32),
    "test.lists": ([[1, 2], [3, 4]], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.ARRAY),
}
TENSORS = {
    "a.weight": np.arange(7, dtype=np.float32),
    "b.weight": np.arange(2 * 3 * 5 * 4, dtype=np.float16).reshape(2, 3, 5, 4),
    "c.weight": np.frombuffer(bytes(range(68)), np.uint8).reshape(2, 34),  # two blocks of Q8_0
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def write_model(file: Path, **more: Any) -> Path:
    writer = gguf.GGUFWriter(file, "test")
    writer.add_custom_alignment(256)
    for name, (value, kind, inner) in FIELDS.items():
        writer.add_key_value(name, value, kind, sub_type=inner)
    for name, value in more.items():
        writer.add_key_value(f"sparsek.{name}", value, gguf.GGUFValueType.STRING)
    for name, data in TENSORS.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if name[0] == "c" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def fields(file: Path) -> dict[str, Any]:
    """Type and bytes of every field that is not ours."""
    reader = gguf.GGUFReader(file)
    return {
        name: (field.types, b"".join(part.tobytes() for part in field.parts))
        for name, field in reader.fields.items()
        if not name.startswith(("sparsek.", "GGUF."))
    }


def tensors(file: Path) -> dict[str, Any]:
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def test_only_the_setting_changes(sparsek: Sparsek, model: Path) -> None:
    copy = model.with_name("copy.gguf")
    printed = sparsek(
        "annotate", str(model), str(copy), "-k", "64", "--window", "32", "--dense-layers", "0,3"
    )
    assert f"wrote {copy}" in printed
    assert "sparsek.top_k = 64" in printed
    assert fields(copy) == fields(model)
    assert tensors(copy) == tensors(model)
    reader = gguf.GGUFReader(copy)
    assert reader.alignment == 256
    assert all(tensor.data_offset % 256 == 0 for tensor in reader.tensors)
    written = SparseKConfig(top_k=64, window=32, dense_layers=(0, 3))
    assert SparseKConfig.from_gguf_metadata(read_header(copy).metadata) == written
    assert sorted(file.name for file in model.parent.iterdir()) == ["copy.gguf", "model.gguf"]


def test_a_setting_is_replaced_and_removed(sparsek: Sparsek, model: Path) -> None:
    old = write_model(model.with_name("old.gguf"), top_k="auto", tail="none", dense_layers="none")
    new, none = model.with_name("new.gguf"), model.with_name("none.gguf")
    sparsek("annotate", str(old), str(new), "--pure", "-k", "16")
    assert SparseKConfig.from_gguf_metadata(read_header(new).metadata) == SparseKConfig.pure(16)
    printed = sparsek("annotate", str(new), str(none), "--remove")
    assert "removed: sparsek.top_k, sparsek.sinks" in printed
    assert none.read_bytes() == model.read_bytes()
    assert "it has no sparsek.* metadata" in sparsek("annotate", str(none), str(new), "--remove", "--force")
    assert new.read_bytes() == model.read_bytes()


def test_a_configuration_file(sparsek: Sparsek, model: Path) -> None:
    config = SparseKConfig(top_k=(8, "auto"), stride=100, tail="none")
    file, copy = model.with_name("config.json"), model.with_name("copy.gguf")
    file.write_text(config.to_json())
    sparsek("annotate", str(model), str(copy), "--config", str(file))
    assert SparseKConfig.from_gguf_metadata(read_header(copy).metadata) == config


@pytest.mark.model
def test_the_model_carries_its_setting(sparsek: Sparsek, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    copy = tmp_path / "model.gguf"
    sparsek("annotate", str(embedded_model()), str(copy), "-k", "48")
    assert tensors(copy) == tensors(embedded_model())
    assert open_engine("llama", str(copy)).model_config == SparseKConfig(top_k=48)
    bench = sparsek("bench", "-m", str(copy), "-p", "8", "-n", "0", "-r", "1", "-o", "json")
    assert [record["top_k"] for record in json.loads(bench)] == [0, 48]
    cost = sparsek("eval", "-m", str(copy), "--context", "64", "--min-context", "0", "-o", "json")
    assert [record["top_k"] for record in json.loads(cost)] == [48]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "Missing argument 'OUT.gguf'"),
        (["{folder}/none.gguf", "{folder}/out.gguf"], "no such file: '{folder}/none.gguf'"),
        (["{model}", "{folder}/no/out.gguf"], "no such directory: '{folder}/no'"),
        (["{model}", "{model}", "--force"], "input and output are the same file: {model}"),
        (["{model}", "{folder}/link.gguf", "--force"], "input and output are the same file"),
        (["{model}", "{folder}/hard.gguf", "--force"], "input and output are the same file"),
        (["{model}", "{folder}", "--force"], "the output exists and is not a file: {folder}"),
        (["{model}", "{folder}/other.gguf"], "the output exists (--force replaces it): {folder}/other.gguf"),
        (["{folder}/other.gguf", "{folder}/out.gguf"], "not a GGUF file (it begins with 'none')"),
        (["{folder}/cut.gguf", "{folder}/out.gguf"], "truncated GGUF file"),
        (["{model}", "{folder}/out.gguf", "-k", "1,2"], "-k 1,2: annotate takes one K"),
        (["{model}", "{folder}/out.gguf", "-k", "0"], "-k 0 is dense attention"),
        (["{model}", "{folder}/out.gguf", "--sinks", "-1"], "sinks = -1: must be an integer from 0"),
        (["{model}", "{folder}/out.gguf", "--remove", "-k", "3"], "--remove takes no setting"),
        (["{model}", "{folder}/out.gguf", "--remove", "--sinks", "0"], "--remove takes no setting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_line(sparsek_fails: Sparsek, model: Path, arguments: list[str], message: str) -> None:
    folder = model.parent
    (folder / "link.gguf").symlink_to(model)
    (folder / "hard.gguf").hardlink_to(model)
    (folder / "other.gguf").write_text("none")
    (folder / "cut.gguf").write_bytes(model.read_bytes()[:-250])
    before = model.read_bytes()
    names = {"model": model, "folder": folder}
    line = sparsek_fails("annotate", *(argument.format(**names) for argument in arguments))
    assert message.format(**names) in line
    assert model.read_bytes() == before
    assert not (folder / "out.gguf").exists()


def test_an_interrupted_copy_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.annotate(model, model.with_name("copy.gguf"), SparseKConfig())
    assert [file.name for file in model.parent.iterdir()] == ["model.gguf"]


def test_a_full_disk_is_told_with_the_name(
    sparsek_fails: Sparsek, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.shutil, "copyfileobj", full)
    copy = model.with_name("copy.gguf")
    assert f"No space left on device: {copy}" in sparsek_fails("annotate", str(model), str(copy))
    assert [file.name for file in model.parent.iterdir()] == ["model.gguf"]


def test_names_of_any_bytes(sparsek: Sparsek, model: Path) -> None:
    source, copy = (model.with_name(os.fsdecode(name)) for name in (b"caf\xe9.gguf", b"caf\xe8.gguf"))
    model.rename(source)
    assert "caf\\xe8.gguf" in sparsek("annotate", str(source), str(copy))
    assert tensors(copy) == tensors(source)


# ---- Models in shards


@pytest.fixture(params=[False, True], ids=["", "first empty"])
def shards(tmp_path: Path, request: pytest.FixtureRequest) -> list[Path]:
    return tiny_gguf.llama().write_shards(tmp_path, "big", 3, first_empty=request.param)


def test_shards_become_one_file(sparsek: Sparsek, shards: list[Path]) -> None:
    one, plain = shards[0].with_name("one.gguf"), shards[0].with_name("plain.gguf")
    assert f"wrote {one}\n" in sparsek("annotate", str(shards[0]), str(one), "-k", "48")
    assert SparseKConfig.from_gguf_metadata(read_header(one).metadata) == SparseKConfig(top_k=48)
    sparsek("annotate", str(one), str(plain), "--remove")
    whole = tiny_gguf.llama().write(shards[0].with_name("whole.gguf"))
    assert plain.read_bytes() == whole.read_bytes()


def test_tensors_of_shards_move_to_the_first_ones_alignment(sparsek: Sparsek, tmp_path: Path) -> None:
    model = tiny_gguf.llama()
    model.fields["general.alignment"] = 512  # which the others do not have
    for i, name in enumerate(model.tensors):
        model.tensors[name] = np.arange(1 + i * 37, dtype=np.float32)
    first = model.write_shards(tmp_path, "big", 4)[0]
    one = tmp_path / "one.gguf"
    sparsek("annotate", str(first), str(one))
    reader = gguf.GGUFReader(one)
    assert reader.alignment == 512
    assert all(tensor.data_offset % 512 == 0 for tensor in reader.tensors)
    assert {t.name: t.data.tobytes() for t in reader.tensors} == {
        name: tensor.tobytes() for name, tensor in model.tensors.items()
    }


def test_shards_become_shards(sparsek: Sparsek, shards: list[Path]) -> None:
    made = [shard.with_name(shard.name.replace("big", "sparse")) for shard in shards]
    printed = sparsek("annotate", str(shards[0]), str(made[0]), "-k", "48")
    assert all(f"wrote {file}\n" in printed for file in made)
    assert SparseKConfig.from_gguf_metadata(read_header(made[0]).metadata) == SparseKConfig(top_k=48)
    assert fields(made[0]) == fields(shards[0])
    assert [tensors(file) for file in made] == [tensors(file) for file in shards]
    assert [file.read_bytes() for file in made[1:]] == [file.read_bytes() for file in shards[1:]]
    sparsek("annotate", str(made[0]), str(shards[0]), "--remove", "--force")
    assert "sparsek.top_k" not in read_header(shards[0]).metadata


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("big-00002-of-00003", "one", "this is shard 2 of 3, give the first, big-00001-of-00003.gguf"),
        (
            "big-00001-of-00003",
            "x-00001-of-00002",
            "the model has 3 shards: name the first, x-00001-of-00003.gguf",
        ),
        (
            "big-00001-of-00003",
            "x-00002-of-00003",
            "the model has 3 shards: name the first, x-00001-of-00003.gguf",
        ),
        ("big-00001-of-00003", "big-00001-of-00003", "input and output are the same file"),
        ("big-00001-of-00003", "link", "input and output are the same file"),
        (
            "big-00001-of-00003",
            "there-00001-of-00003",
            "the output exists (--force replaces it): {folder}/there-00003",
        ),
        ("cut-00001-of-00002", "one", "truncated GGUF file"),
        ("lone-00001-of-00002", "one", "shard 2 of 2 is missing: {folder}/lone-00002-of-00002.gguf"),
    ],
)
def test_error_line_of_shards(
    sparsek_fails: Sparsek, tmp_path: Path, source: str, target: str, message: str
) -> None:
    big, cut, lone = (
        tiny_gguf.llama().write_shards(tmp_path, n, c) for n, c in (("big", 3), ("cut", 2), ("lone", 2))
    )
    cut[1].write_bytes(cut[1].read_bytes()[:-9000])
    lone[1].unlink()
    (tmp_path / "link.gguf").symlink_to(big[2])
    (tmp_path / "there-00003-of-00003.gguf").touch()
    before = sorted(tmp_path.iterdir())
    line = sparsek_fails("annotate", f"{tmp_path}/{source}.gguf", f"{tmp_path}/{target}.gguf")
    assert message.format(folder=tmp_path) in line
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_copy_of_shards_leaves_nothing(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copied = library.shutil.copyfileobj, []

    def interrupted(*given: Any) -> None:
        copied.append(given)
        if len(copied) == 3:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(library.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.annotate(shards[0], shards[0].with_name("x-00001-of-00003.gguf"), SparseKConfig())
    assert sorted(shards[0].parent.iterdir()) == shards
