"""The SPARSEK_* variables, as servers in Python read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsek import SparseKConfig
from sparsek.integrations.environment import fields_from_environment

from .service_variables import NOT_OF_A_SERVICE, OF_A_SERVICE


def test_single_fields() -> None:
    environ = {
        "PATH": "/bin",
        "SPARSEK_TOP_K": "64,auto",
        "SPARSEK_TAIL": "none",
        "SPARSEK_DENSE_LAYERS": "none",
        "SPARSEK_MIN_CONTEXT": "0",
        "SPARSEK_NUM_THREADS": "2",
    }
    expected = {"top_k": (64, "auto"), "tail": "none", "dense_layers": (), "min_context": 0}
    assert fields_from_environment(environ) == expected


def test_without_variables_there_are_no_fields() -> None:
    assert fields_from_environment({"HOME": "/root"}) == {}


def test_a_file_changed_by_single_fields(tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    file.write_text(SparseKConfig(64, sinks=8).to_json())
    fields = fields_from_environment({"SPARSEK_CONFIG": str(file), "SPARSEK_TOP_K": "32"})
    assert SparseKConfig.from_dict(fields) == SparseKConfig(32, sinks=8)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SPARSEK_TOPK": "64"}, "there is no variable SPARSEK_TOPK: known are SPARSEK_CONFIG"),
        ({"SPARSEK_TOP_K": "many"}, "SPARSEK_TOP_K: top_k = 'many'"),
        ({"SPARSEK_TOP_K": ""}, "SPARSEK_TOP_K: top_k = ''"),
        ({"SPARSEK_SINKS": "-1"}, "SPARSEK_SINKS: sinks = '-1': must be a whole number"),
        ({"SPARSEK_WINDOW": "9999999999"}, "SPARSEK_WINDOW: window = '9999999999'"),
        ({"SPARSEK_TAIL": "short"}, "SPARSEK_TAIL: tail = 'short'"),
        ({"SPARSEK_TILE": "48"}, "SPARSEK_TILE: tile = 48: must be 32 or 64"),
        ({"SPARSEK_CHECK_FINITE": "1"}, "there is no variable SPARSEK_CHECK_FINITE"),
        ({"SPARSEK_CONFIG": "/no/such"}, "SPARSEK_CONFIG = '/no/such': there is no such file"),
        ({"SPARSEK_CONFIG": "/"}, "SPARSEK_CONFIG = '/': not a file"),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        fields_from_environment(environ)


def test_what_a_service_called_sparsek_brings_is_no_setting() -> None:
    assert fields_from_environment({**OF_A_SERVICE, "SPARSEK_TOP_K": "32"}) == {"top_k": 32}


@pytest.mark.parametrize("variable", NOT_OF_A_SERVICE)
def test_what_is_only_like_it_is_a_typing_error(variable: str) -> None:
    with pytest.raises(ValueError, match=f"^there is no variable {variable}: known are"):
        fields_from_environment({**OF_A_SERVICE, variable: "1"})


@pytest.mark.parametrize("text", ["{", '{"top_q": 1}', "[]", '{"top_k": -1}', "\x00", " " * (1 << 21)])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "k.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^SPARSEK_CONFIG = '{file}': "):
        fields_from_environment({"SPARSEK_CONFIG": str(file)})
