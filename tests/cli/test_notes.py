"""Notes beside results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from sparsek import SparseKConfig
from sparsek.bench import attention_call, model
from sparsek.cli import main
from sparsek.cli.notes import note_dense, note_spread

from .. import tiny_gguf
from .conftest import Sparsek

NARROW, WIDE = [100, 101, 99], [100, 130, 80]
NONE = (None, None, None)


def test_repetitions_that_differ_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    note_spread([("pp1", NARROW, NONE), ("pp2", NARROW, (1.5, 1.45, 1.55)), ("pp3", [7], (2.0, 2.0, 2.0))])
    assert capsys.readouterr().err == ""
    note_spread([("pp1", NARROW, NONE), ("pp2", WIDE, NONE), ("pp3", NARROW, (1.5, 1.3, 1.6))])
    assert capsys.readouterr().err == (
        "note: repetitions differ, the middle half of them by more than a tenth of the median, at pp2; pp3: "
        "take more -r, or a machine that does nothing else\n"
    )
    note_spread([(f"pp{i}", WIDE, NONE) for i in range(5)])
    assert "at pp0; pp1; pp2 and 2 more: take" in capsys.readouterr().err


def test_the_note_of_a_command_stands_for_the_warning_of_the_integration(
    sparsek: Sparsek, caplog: pytest.LogCaptureFixture
) -> None:
    sparsek("run", "--engine", "transformers", "-p", "Hi", "-n", "1")
    assert caplog.messages == []


def changed(library: Any, name: str, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Its records have these values."""
    real = getattr(library, name)

    def made(**given: Any) -> Any:
        return real(**given | values)

    monkeypatch.setattr(library, name, made)


@pytest.mark.parametrize(("times", "noted"), [(NARROW, False), (WIDE, True)])
def test_bench_and_bench_attention_point_them_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: list[int],
    noted: bool,
) -> None:
    steady = {"samples_ns": times}
    changed(model, "BenchRecord", monkeypatch, **steady, speedup_low=None, speedup_high=None)
    changed(attention_call, "AttentionRecord", monkeypatch, **steady, ratio_low=None, ratio_high=None)
    rule = ["-k", "8", "--min-context", "0", "-o", "json"]
    file = str(tiny_gguf.llama().write(tmp_path / "a.gguf"))
    for call, name in (
        (["bench", "-m", file, "-p", "32", "-n", "0"], "pp32, K = 8"),
        (["bench-attention", "--tokens", "32", "--heads", "3"], "32 tokens, K = 8"),
    ):
        assert main([*call, *rule]) == 0
        assert (f"at {name}: take more -r" in capsys.readouterr().err) == noted


def test_on_a_gpu_short_prompts_are_dense(capsys: pytest.CaptureFixture[str]) -> None:
    config = SparseKConfig()
    note_dense([config], [1024, 65536], 4096)
    assert "note: at 1024 tokens attention on a GPU is dense whatever K is" in capsys.readouterr().err
    note_dense([dataclasses.replace(config, select="tile", min_context=0)], [1024], 4096)
    assert capsys.readouterr().err == ""
