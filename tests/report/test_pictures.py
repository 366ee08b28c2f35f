"""What the pictures show, read back from their SVG, against the data."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from sparsek.report import charts, palette, sentence_figures, svg
from sparsek.report.parts import parts
from sparsek.report.series import FrontierPoint
from sparsek.report.svg import Picture
from sparsek.report.words import shown, token_text

from .samples import HOSTILE, eval_record, made_up, material

SVG = "{http://www.w3.org/2000/svg}"


def elements(picture: Picture, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg.inline(picture)).iter() if e.get("class") == kind]


def places(picture: Picture, kind: str) -> set[tuple[int, int]]:
    return {(int(e.attrib["data-q"]), int(e.attrib["data-k"])) for e in elements(picture, kind)}


def where(matrix: np.ndarray) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in np.argwhere(matrix)}


def test_webs_have_an_arc_for_each_weight() -> None:
    attention = made_up(tuple("abcdefgh"))
    dense, sparse = sentence_figures.webs(attention)
    assert places(dense, "arc") == where(attention.allowed)
    assert places(sparse, "arc") == where(attention.kept)
    assert len(elements(sparse, "token")) == len(elements(sparse, "word")) == 8
    weights = {e.attrib["data-k"]: e.find(f"{SVG}title").text for e in elements(sparse, "arc")  # type: ignore[union-attr]
               if e.attrib["data-q"] == "7"}  # fmt: skip
    for key, tip in weights.items():
        assert tip == f"h → {attention.tokens[int(key)]}: {attention.sparse[7, int(key)]:.3f}"


def test_mask_has_the_three_kinds_of_cells() -> None:
    attention = made_up(tuple("abcdefgh"))
    picture = sentence_figures.mask(attention)
    assert places(picture, "kept") == where(attention.kept) == where(attention.mask == 0)
    assert places(picture, "dropped") == where(attention.allowed & ~attention.kept)
    text = svg.inline(picture)
    assert f"0, kept: {attention.kept.sum()}" in text
    assert f"base mask: {(~attention.allowed).sum()}" in text


def test_scores_have_a_colour_for_each_allowed_cell_and_a_mark_for_each_kept_one() -> None:
    attention = made_up(tuple("abcdefgh"))
    picture = sentence_figures.scores(attention)
    assert places(picture, "cell") == where(attention.allowed)
    (axes, _) = picture.figure.axes
    dots, squares = axes.lines
    for line, among in ((dots, attention.best), (squares, attention.kept & attention.always)):
        assert set(zip(line.get_ydata(), line.get_xdata(), strict=True)) == where(among)


def test_mass_has_a_cell_for_each_head_of_a_sparse_layer() -> None:
    picture = charts.mass(eval_record(64))
    assert places(picture, "mass") == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert "the least 0.700 in layer 2, head 0" in picture.alt
    assert "keep every key: 0." in picture.alt


def test_error_bars_are_those_of_the_records() -> None:
    with svg.drawing():
        (picture,) = [p for part in parts(material()) for p in part.pictures if p.name == "quality-kl"]
    (bars,) = picture.figure.axes[0].collections[-1:]
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    expected = [(kl - kl / 20, kl + kl / 20) for kl in (0.4 / 16, 0.4 / 64)]
    assert np.allclose(ends, expected)


def test_frontier_survives_a_kl_of_nothing() -> None:
    points = [
        FrontierPoint("eval", "K = 1", 10, -1e-9, 0.0, 1.0),
        FrontierPoint("new", "K = 2", 20, 0.1, 0.2, None),
    ]
    keys, speed = charts.frontier(points)
    assert len(keys.figure.axes[0].containers) == 2
    assert len(speed.figure.axes[0].containers) == 1
    svg.inline(keys)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    hostile = made_up((token_text(HOSTILE), "ordinary", "$x$", "long" * 20))
    points = [FrontierPoint("eval", shown(HOSTILE), 10.0, 0.1, 0.01, 1.2)]
    return [p for part in parts(material(attention=hostile, points=points)) for p in part.pictures]


def test_every_picture_has_words_and_axes_with_units(pictures: list[Picture]) -> None:
    assert len({p.name for p in pictures}) == len(pictures) == 13
    for picture in pictures:
        assert picture.title
        assert len(picture.alt) > 40
        for axes in picture.figure.axes:
            if axes.axison and not hasattr(axes, "_colorbar"):
                assert re.search(r"\(.+\)", axes.get_xlabel()), picture.name
                assert re.search(r"\(.+\)", axes.get_ylabel()), picture.name


def test_inline_pictures_follow_the_theme(pictures: list[Picture]) -> None:
    roles = {light for light, _ in palette.COLOURS.values()}
    for picture in pictures:
        text = svg.inline(picture)
        assert "var(--ink)" in text
        assert not roles & set(re.findall(r"#[0-9a-f]{6}", text)), picture.name
        ids = re.findall(r' id="([^"]*)"', text)
        assert all(picture.name in i for i in ids)
        assert len(ids) == len(set(ids))
        for used in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text):
            assert (used[0] or used[1]) in ids


def test_the_palette_is_not_of_the_colour_map() -> None:
    from matplotlib import colormaps

    mapped = {to_hex(colour) for colour in colormaps["viridis"](np.arange(256))}
    assert not mapped & {light for light, _ in palette.COLOURS.values()}


def test_images_are_the_same_each_time(pictures: list[Picture], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files = svg.write_images(pictures[:2], tmp_path / folder)
    assert [file.name for file in files] == [
        f"web-{kind}.{suffix}" for kind in ("dense", "sparse") for suffix in ("svg", "png")
    ]
    for file in files:
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    root = ElementTree.parse(files[0]).getroot()
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path, ending: str) -> None:
    (picture, *_) = sentence_figures.webs(made_up(("a", "b")))
    file = tmp_path / f"{picture.name}.{ending}"
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        svg.write_images([picture], tmp_path)
    assert caught.value.filename == str(file)
