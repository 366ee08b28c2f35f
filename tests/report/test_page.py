"""The page as text: everything that comes from outside is escaped, nothing comes from the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from sparsek.report.page import page
from sparsek.report.parts import parts
from sparsek.report.records import Records
from sparsek.report.words import token_text

from .samples import HOSTILE, bench_record, eval_record, made_up, material


class Reader(HTMLParser):
    """Counts elements and collects attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def text() -> str:
    tokens = tuple(token_text(word) for word in (HOSTILE, "</script>", "&amp;", "שלום", "\U0001f642"))
    m = material(attention=made_up(tokens))
    return page(m, parts(m))


def test_hostile_words_stay_words(text: str) -> None:
    reader = Reader(text)
    assert reader.tags.count("script") == 2
    assert "alert('x')" in reader.words
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert text.encode("utf-8", errors="replace")


def test_data_are_what_was_given(text: str) -> None:
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)
    found = json.loads(data)
    assert found["tokens"][1:3] == ["</script>", "&amp;"]
    assert [len(row) for row in found["rows"]] == [1, 2, 3, 4, 5]
    for row in found["rows"]:
        assert sum(weight for _, weight, _, _ in row) == pytest.approx(1, abs=1e-3)
        assert sum(weight for _, _, weight, kept in row if kept) == pytest.approx(1, abs=1e-3)


def test_nothing_is_fetched(text: str) -> None:
    for name, value in Reader(text).attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            assert value.startswith(("#", "data:")), value
    assert "@import" not in text
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)


def test_the_parts_are_there(text: str) -> None:
    titles = re.findall(r"<h2><span>(\d)</span>", text)
    assert titles == list("123456789")
    assert text.count("<figure") == text.count("<figcaption>") == 12


def test_what_was_read_is_said(text: str) -> None:
    words = Reader(text).words
    assert "not measured in this run" in words
    assert "Measured in this run: small in transformers" in words
    assert "The tuning in tune.json was of small on book.txt" in words


def test_records_with_nothing_to_draw_are_said() -> None:
    records = Records(
        bench=[bench_record(0, 0, n_gen=8)],
        eval=[eval_record(0, config=None)],
        files={"bench": ["a.json"], "eval": ["b.json"]},
    )
    m = material(records=records)
    words = Reader(page(m, parts(m))).words
    assert "no fitting record in a.json" in words
    assert "no fitting record in b.json" in words
    assert "No record has it." in words
