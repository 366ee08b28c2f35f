"""Code blocks, code in sentences and links of the project's pages.

What stands before a block says how it is tested: `<!-- test: WORD -->`, without one `quick`.

    quick      in `make test`, in a folder with some files in it
    long       the same in `make test-docs`
    clean      in `make test-docs`, in an environment that has nothing but Python, in a clone
    ci         `.ci/run` runs these lines
    no, WHY    not run: it needs a GPU, a server, another program
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK: Final = re.compile(r"(?:<!-- test: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    number: int  # of the page's, from 1
    test: str
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.name}-{self.number}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for number, found in enumerate(_BLOCK.finditer(page.read_text()), 1):
            test, language, code = found.groups()
            yield Block(page, number, test or "quick", language, code)


def code_in_sentences() -> Iterator[tuple[str, str]]:
    """(page, code) of what stands between single backquotes."""
    for page in PAGES:
        text = _BLOCK.sub("", page.read_text())
        for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
            yield page.name, " ".join(found[1].split())


def commands(program: str) -> Iterator[tuple[str, str]]:
    """(page, command line) of each call of a program, in shell blocks and in sentences."""
    for block in blocks():
        if block.language == "sh":
            lines = block.code.replace("\\\n", " ").splitlines()
            yield from ((block.name, call) for line in lines for call in _calls(line, program))
    for page, code in code_in_sentences():
        yield from ((page, call) for call in _calls(code, program))


def _calls(line: str, program: str) -> Iterator[str]:
    for found in re.finditer(rf"(?:^|[\s(;&|]|bin/){program} ([^#;&|)]*)", line):
        yield found[1].strip()


def links() -> Iterator[tuple[Path, str]]:
    """(page, target) of each link and picture that is in the project."""
    for page in PAGES:
        for found in re.finditer(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in found[1]:
                yield page, found[1]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
