"""`sparsek report`: one page of the embedded model, looked at in Chromium where that is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from ..report.samples import bench_record, eval_record, tune_record
from .conftest import Sparsek

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
UNITS = (
    "(token)", "(tokens)", "(number)", "(mean number)", "(keys)", "(nats)", "(ratio)", "(tokens per second)",
    "(no unit)", "(share of 1)",
)  # fmt: skip
WORDS = 'The "cat" <b>& Anna</b> saw \U0001f642 and שלום.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds page.html, made once with everything measured, and its pictures."""
    from sparsek.cli import main

    made = tmp_path_factory.mktemp("report")
    tuned = made / "tune.json"
    tuned.write_text(json.dumps(tune_record()))
    options = ["--lengths", "64,128", "--context", "128", "-k", "8,16", "--min-context", "100"]
    places = ["-o", str(made / "page.html"), "--images", str(made / "images"), "--records", str(tuned)]
    assert main(["report", "--sentence", WORDS, *options, *places]) == 0
    return made


@pytest.mark.model
def test_page_and_pictures_are_written(folder: Path) -> None:
    text = (folder / "page.html").read_text()
    for word in ("Measured in this run", "not measured", "&lt;b&gt;&amp; Anna"):
        assert (word in text) == (word != "not measured"), word
    assert "<b>& Anna" not in text
    names = {file.name for file in (folder / "images").iterdir()}
    assert len(names) == 26
    assert {"web-dense.svg", "mask.png", "frontier-speed.svg"} <= names


@pytest.mark.model
def test_commands_repeat_the_parts(folder: Path) -> None:
    text = (folder / "page.html").read_text()
    first = "sparsek bench --min-context 100 -p 64 -n 0 -r 1 -k 0,8"
    assert f"{first} &amp;&amp; sparsek bench --min-context 100 -p 128 -n 0 -r 1 -k 0,8,16" in text
    assert "sparsek eval --engine transformers --context 128 --min-context 0 -k 8,16" in text
    assert re.search(r"sparsek report .*--sentence &#x27;The &quot;cat&quot;", text)


@pytest.mark.model
def test_records_replace_measuring(sparsek: Sparsek, tmp_path: Path) -> None:
    files = []
    for name, records in {
        "bench.jsonl": [bench_record(n, k) for n in (512, 2048) for k in (0, 64)],
        "eval.jsonl": [eval_record(16, 0.1), eval_record(64, 0.01)],
    }.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        files += ["--records", str(tmp_path / name)]
    page = tmp_path / "page.html"
    assert f"wrote {page}" in sparsek("report", *files, "-o", str(page), "--layer", "3", "--head", "2")
    text = page.read_text()
    assert "Measured in this run" not in text
    assert text.count("not measured in this run") == 3
    assert "Layer 3, head 2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "/no/such/page.html"], "no such directory: '/no/such'"),
        (["-o", "/tmp"], "this is a directory, give a file: '/tmp'"),
        (["--images", "/no/such/folder"], "no such directory: '/no/such'"),
        (["--images", "/etc/passwd"], "this is not a directory: '/etc/passwd'"),
        (["--images", ""], "this is not a directory: ''"),
        (["--records", __file__, "-o", __file__], "this file has two uses"),
        (["--lengths", "64,99999"], "99999 tokens are more than the model's context of 8192"),
        (["--sentence", "\udcff"], "--sentence is not UTF-8 text: '\\xff' at character 0"),
        (["--records", "/no/such.json"], "No such file or directory: /no/such.json"),
        (["-k", "0,64"], "-k 0,64: 0 is dense attention"),
        (["--lengths", "0"], "'0' is not a number of tokens >= 1"),
        (["--sentence", " "], "the sentence is empty: ' '"),
        (["--sentence", "a " * 70], "tokens, at most 64 can be drawn: 'a a"),
        (["--layer", "30"], "layer = 30: the model has layers 0 to 29"),
        (["--head", "-1"], "head = -1: the model has heads 0 to 8"),
        (["--pure", "--sentence-k", "0"], "keeps no key at all"),
        (["-m", "/no/such.gguf"], "no such model: '/no/such.gguf'"),
        (["--text", "/no/such.txt"], "No such file or directory: /no/such.txt"),
    ],
)
def test_errors(sparsek_fails: Sparsek, tmp_path: Path, arguments: list[str], message: str) -> None:
    at = [] if "-o" in arguments else ["-o", str(tmp_path / "page.html")]
    assert message in sparsek_fails("report", *at, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"a": 1}', "no json", ""])
def test_bad_records(sparsek_fails: Sparsek, tmp_path: Path, content: str) -> None:
    file = tmp_path / "records.json"
    file.write_text(content)
    assert str(file) in sparsek_fails("report", "-o", str(tmp_path / "page.html"), "--records", str(file))


# ---- In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    profile = tmp_path_factory.mktemp("profile")
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            args=FLAGS,
            env={**os.environ, "HOME": str(profile)},
            color_scheme="light",
            viewport={"width": 1200, "height": 900},
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def opened(browser: Any, folder: Path) -> Any:
    """The page, with what it said and asked for meanwhile in `said` and `asked`."""
    page = browser.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto((folder / "page.html").as_uri())
    return page


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.model
def test_figures_say_what_they_are(opened: Any) -> None:
    figures = opened.locator("figure")
    assert figures.count() == 13
    for figure in figures.all():
        drawing = figure.locator("svg")
        assert drawing.get_attribute("role") in ("img", "group")
        assert len(drawing.get_attribute("aria-label")) > 60
        assert figure.locator("figcaption").inner_text()
        words = drawing.locator("text").all_text_contents()
        if not drawing.get_attribute("id").startswith("picture-web"):
            assert sum(word.endswith(UNITS) for word in words) >= 2, words


@pytest.mark.model
def test_a_token_shows_what_it_keeps(opened: Any) -> None:
    data = json.loads(opened.locator("#attention").text_content())
    query = len(data["tokens"]) - 2
    kept = {key: weight for key, _, weight, is_kept in data["rows"][query] if is_kept}
    opened.locator(f"#picture-web-sparse .token[data-q='{query}']").hover()
    lit = opened.eval_on_selector_all("#picture-web-sparse .token.key", "all => all.map(e => +e.dataset.q)")
    assert set(lit) == set(kept)
    arcs = opened.eval_on_selector_all("#picture-web-sparse .arc.on", "all => all.map(e => +e.dataset.k)")
    assert set(arcs) == set(kept)
    told = opened.locator("#readout li").all_inner_texts()
    assert len(told) == len(kept)
    assert told[0].endswith(f"{max(kept.values()):.3f}")
    opened.mouse.move(5, 5)
    assert opened.locator(".token.key").count() == 0


@pytest.mark.model
def test_tokens_can_be_reached_by_keyboard_and_pinned(opened: Any) -> None:
    opened.locator("#picture-web-sparse .token[data-q='0']").focus()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("#picture-web-sparse .token[aria-pressed=true]").get_attribute("data-q") == "1"
    opened.keyboard.press("Enter")
    opened.locator("#theme").focus()
    assert opened.locator("#picture-web-sparse .token.query").get_attribute("data-q") == "1"
    opened.locator("#picture-web-sparse .token[data-q='1']").focus()
    opened.keyboard.press("Escape")
    assert opened.locator(".token.query").count() == 0


@pytest.mark.model
def test_cells_tell_their_values(opened: Any) -> None:
    opened.locator("#picture-mask .kept").first.hover()
    assert opened.locator("#figure-mask output").inner_text().endswith("0, kept")


@pytest.mark.model
def test_light_and_dark(opened: Any) -> None:
    light = background(opened)
    opened.locator("#theme").click()
    dark = background(opened)
    assert light != dark
    opened.locator("#theme").click()
    assert background(opened) == light
    opened.evaluate("delete document.documentElement.dataset.theme")
    opened.emulate_media(color_scheme="dark")
    assert background(opened) == dark
    opened.emulate_media(color_scheme="light")


@pytest.mark.model
def test_a_phone_needs_no_scrolling_sideways(opened: Any) -> None:
    opened.set_viewport_size({"width": 400, "height": 800})
    opened.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    opened.set_viewport_size({"width": 1200, "height": 900})


@pytest.mark.model
def test_nothing_is_asked_of_the_network_and_no_error_is_said(opened: Any, folder: Path) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [(folder / "page.html").as_uri()]
