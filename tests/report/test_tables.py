from __future__ import annotations

from sparsek.report.tables import budget_text, markdown_table, rule_text


def test_columns_are_padded_and_numbers_stand_right() -> None:
    assert markdown_table(["name", "n"], [["a", "1"], ["long name", "22"]]).splitlines() == [
        "| name      |  n |",
        "| --------- | -: |",
        "| a         |  1 |",
        "| long name | 22 |",
    ]


def test_what_is_in_a_cell_stays_there() -> None:
    table = markdown_table(
        ["a|b"], [["x|y"], ["x\\|y"], ["two\nlines\r"], ["caf\udce9"], ["\x1b[31mred é ±"]]
    )
    assert table.splitlines() == [
        "| a\\|b            |",
        "| --------------- |",
        "| x\\|y            |",
        "| x\\\\\\|y          |",  # Markdown makes x\|y of it
        "| two\\nlines\\r    |",
        "| caf\\xe9         |",
        "| \\x1b[31mred é ± |",
    ]


def test_auto_with_what_it_was() -> None:
    assert budget_text("auto", 48) == "auto (48)"
    assert budget_text("auto", None) == "auto"
    assert budget_text(64, 384) == "64"


def test_what_one_call_keeps() -> None:
    assert rule_text(64, 0.0, 100) == "64"
    assert rule_text(100, 0.0, 100) == "all"
    assert rule_text(2**31 - 1, 0.002, 100) == "share 0.002"
    assert rule_text(64, 0.002, 100) == "share 0.002, K 64"
