"""The page: one HTML file with everything in it, which asks the network for nothing.

A content security policy says so to the browser too: no address is allowed, and no script but the page's own.
Every text that comes from outside goes through `escape`, or through the JSON of `_data`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from . import palette, svg
from .parts import Material, Part
from .tensors import SentenceAttention


def page(m: Material, parts: list[Part]) -> str:
    """The HTML of the whole page."""
    script = _template("page.js")
    sections = [_section(number, part) for number, part in enumerate(parts, 1)]
    names = [(part.name, part.title) for part in parts] + [
        ("environment", "The environment, and how to repeat it")
    ]
    sections.append(_environment(len(names), m, parts))
    contents = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in names)
    return Template(_template("page.html")).substitute(
        title=escape(f"Sparse-K on {m.model}"),
        lead=escape(_lead(m)),
        sentence=escape(m.sentence),
        contents=contents,
        sections="\n".join(sections),
        css=Template(_template("page.css")).substitute(colours=palette.css()),
        script=script,
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data(m.attention),
    )


def _lead(m: Material) -> str:
    return (
        f"What Sparse-K does to the attention of {m.model}, what it costs and what it gains. Each query "
        "keeps its K strongest keys. All pictures show this model's own tensors and measurements. Made on "
        f"{m.environment['time'][:10]}."
    )


def _section(number: int, part: Part) -> str:
    figures = "".join(_figure(picture) for picture in part.pictures)
    readout = ""
    if part.name == "web":
        hint = "Point at a token to see what it keeps."
        readout = f'<div class="readout" id="readout" aria-live="polite">{hint}</div>'
    table = ""
    if part.rows:
        table = f"<details><summary>The numbers</summary>{_table(part.titles, part.rows)}</details>"
    source = f'<p class="source">{escape(part.source)}</p>' if part.source else ""
    return (
        f'<section id="{part.name}"><h2><span>{number}</span> {escape(part.title)}</h2>'
        f'<p>{escape(part.text)}</p><div class="figures n{len(part.pictures)}">{figures}</div>{readout}'
        f"{source}{table}</section>"
    )


def _figure(picture: svg.Picture) -> str:
    tip = (
        ""
        if picture.live or not picture.tips
        else '<output class="tip">Point at a cell for its value.</output>'
    )
    # The title is in the drawing; a reader of the screen has it in the label of the <svg>.
    return (
        f'<figure id="figure-{picture.name}"><div class="box" tabindex="-1">{svg.inline(picture)}</div>'
        f"{tip}<figcaption>{escape(picture.title)}</figcaption></figure>"
    )


def _table(titles: Any, rows: Any) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _environment(number: int, m: Material, parts: list[Part]) -> str:
    columns = _environments(m)
    keys = list(dict.fromkeys(key for _, environment in columns for key in environment))
    rows = [[key.replace("_", " "), *(str(e.get(key, "")) for _, e in columns)] for key in keys]
    commands: dict[str, list[str]] = {}
    for i, part in enumerate(parts, 1):
        if part.command:
            commands.setdefault(part.command, []).append(str(i))
    lines = [f"<dt>The whole page</dt><dd><pre><code>{escape(m.command)}</code></pre></dd>"]
    for command, numbers in commands.items():
        name = f"Part {numbers[0]}" if len(numbers) == 1 else f"Parts {', '.join(numbers)}"
        lines.append(f"<dt>{name}</dt><dd><pre><code>{escape(command)}</code></pre></dd>")
    return (
        f'<section id="environment"><h2><span>{number}</span> The environment, and how to repeat it</h2>'
        "<p>Where the numbers come from, and the commands that give them again. "
        "Times differ from run to run.</p>"
        f"{_table(['', *(name for name, _ in columns)], rows)}<dl>{''.join(lines)}</dl></section>"
    )


def _environments(m: Material) -> list[tuple[str, dict[str, Any]]]:
    """This run's, and those of the records that were read, without repetitions."""
    columns: list[tuple[str, dict[str, Any]]] = [("this run", m.environment)]
    for kind, names in m.records.files.items():
        for record in getattr(m.records, kind):
            found = {key: value for key, value in record["environment"].items() if key != "time"}
            if not any(found == {k: v for k, v in e.items() if k != "time"} for _, e in columns[1:]):
                columns.append((f"records of {kind}: {', '.join(names)}", record["environment"]))
    return columns


def _data(a: SentenceAttention) -> str:
    """What the script shows: of each query its keys, with their weights in thousandths."""
    rows = [
        [
            [
                int(key),
                round(float(a.dense[query, key]), 4),
                round(float(a.sparse[query, key]), 4),
                bool(a.kept[query, key]),
            ]
            for key in np.flatnonzero(a.allowed[query])
        ]
        for query in range(a.size)
    ]
    text = json.dumps({"tokens": a.tokens, "rows": rows}, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template(name: str) -> str:
    return (files(__package__) / "template" / name).read_text(encoding="utf-8")
