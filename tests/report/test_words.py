from __future__ import annotations

import pytest

from sparsek.report.words import shown_all, token_text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" cat", "cat"),
        ("  ", "␣"),
        ("", "[special]"),
        ("\n", "↵"),
        ("\x00", "␀"),
        ("\ud800", "�"),
        ("\x85", "�"),
    ],
)
def test_every_token_can_be_shown(token: str, shown: str) -> None:
    assert token_text(token) == shown


def test_records_are_made_fit_in_depth() -> None:
    given = {"a\x01": ["\ud800", {"b": 3}], "c": None}
    assert shown_all(given) == {"a␁": ["�", {"b": 3}], "c": None}
