"""Pictures of one head on a sentence: the web of attention, the matrix of scores, the mask."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path

from ..config import budget_name, budget_words
from . import palette
from .series import chosen_words, rule_words
from .svg import Picture, new_figure
from .tensors import Matrix, SentenceAttention

_FAINTEST: Final = 0.02  # a weight below it is no line that an eye could see


def webs(a: SentenceAttention) -> list[Picture]:
    """The sentence with an arc from each query to its keys, dense and Sparse-K."""
    allowed, kept = int(a.allowed.sum()), int(a.kept.sum())
    place = f"layer {a.layer}, head {a.head}"
    return [
        _web(a, "web-dense", f"Dense attention: {allowed} weights", a.dense, a.allowed, palette.DENSE,
             f"Arcs over {a.size} tokens of a sentence, one for each of the {allowed} pairs of query and key "
             f"of {place}; the stronger, the more weight."),
        _web(a, "web-sparse", f"Sparse-K, {budget_words(budget_name(a.config))}: {kept} weights",
             a.sparse, a.kept, palette.SPARSE,
             f"The same tokens with the {kept} arcs that Sparse-K keeps: for each query its "
             f"{chosen_words(a.config)}, and what the rule always keeps ({rule_words(a.config)})."),
    ]  # fmt: skip


def _web(
    a: SentenceAttention, name: str, title: str, weights: Matrix, drawn: Matrix, colour: str, alt: str
) -> Picture:
    longest = max(map(len, a.tokens))
    below = 0.085 * min(longest, 24) + 0.25
    step, above = 0.225, 1.9
    width = max(4.6, step * a.size + 0.3)
    figure = new_figure(width, above + below, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    margin = (width / step - a.size) / 2
    axes.set_xlim(-0.5 - margin, a.size - 0.5 + margin)
    axes.set_ylim(-below / above, 1.08)
    axes.text(0.02, 0.985, title, transform=axes.transAxes, va="top", fontsize=9.5)
    tips = {}
    for query in range(a.size):
        for key in np.flatnonzero(drawn[query]):
            gid = f"arc.{query}.{key}"
            weight = float(weights[query, key])
            _arc(axes, query, int(key), weight, a.size, colour, gid)
            tips[gid] = f"{a.tokens[query]} → {a.tokens[key]}: {weight:.3f}"
    for i, token in enumerate(a.tokens):
        hit = Rectangle(
            (i - 0.5, -below / above), 1, below / above - 0.01, facecolor=colour, alpha=0.004, lw=0
        )
        hit.set_gid(f"token.{i}")
        tips[f"token.{i}"] = f"{token}, position {i}"
        axes.add_patch(hit)
        word = token if len(token) <= 24 else f"{token[:23]}…"
        text = axes.text(i, -0.06, word, rotation=90, ha="center", va="top", fontsize=8.5)
        text.set_gid(f"word.{i}")
    least = round(width * 72 * 1.05)
    return Picture(name, title, alt, figure, tips, live=True, least_width=least)


def _arc(axes: Axes, query: int, key: int, weight: float, size: int, colour: str, gid: str) -> None:
    alpha = min(1.0, max(_FAINTEST, weight) ** 0.7)
    if query == key:  # a token that attends to itself: a dot on it
        (dot,) = axes.plot([query], [0], "o", color=colour, alpha=alpha, ms=1.5 + 4 * weight**0.5, mew=0)
        dot.set_gid(gid)
        return
    height = 2 * 0.93 * ((query - key) / max(size - 1, 1)) ** 0.7  # a curve rises to half its control point
    path = Path([(query, 0), ((query + key) / 2, height), (key, 0)], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    arc = PathPatch(path, fill=False, edgecolor=colour, alpha=alpha, linewidth=0.6 + 2.6 * weight)
    arc.set_gid(gid)
    axes.add_patch(arc)


def scores(a: SentenceAttention) -> Picture:
    """All scores of the head, the kept ones marked."""
    figure, axes = _matrix(a, 0.62)
    shown = a.scores[a.allowed]
    norm = Normalize(float(shown.min()), float(max(shown.max(), shown.min() + 1e-9)))
    colours = colormaps["viridis"]
    tips = {}
    for query, key in np.argwhere(a.allowed):
        gid = f"cell.{query}.{key}"
        score = float(a.scores[query, key])
        state = "top-K" if a.best[query, key] else "always kept" if a.kept[query, key] else "dropped"
        tips[gid] = f"query {a.tokens[query]}, key {a.tokens[key]}: {score:.2f}, {state}"
        _cell(axes, int(query), int(key), to_hex(colours(norm(score))), gid)
    dots, squares = a.best, a.kept & a.always
    queries, keys = np.nonzero(dots)
    axes.plot(keys, queries, "o", ms=4, mfc=palette.ON_MAP, mec=palette.ON_MAP_EDGE, mew=0.7)
    queries, keys = np.nonzero(squares)
    axes.plot(keys, queries, "s", ms=3.6, mfc="none", mec=palette.ON_MAP, mew=0.7)
    handles = [
        Line2D([], [], marker="o", ls="", mfc=palette.PAPER, mec=palette.INK, ms=4.5, label="top-K"),
        Line2D(
            [], [], marker="s", ls="", mfc="none", mec=palette.INK, ms=4.5, label="kept whatever its score"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.2, columnspacing=1)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("score, q·k/√D (no unit)")
    bar.outline.set_visible(False)
    title = f"Scores, layer {a.layer}, head {a.head}"
    alt = (
        f"{a.size} by {a.size} matrix, queries down and keys across, of scores from {norm.vmin:.1f} to "
        f"{norm.vmax:.1f}. {int(dots.sum())} cells are marked as top-K, at most {a.config.top_k} in each "
        f"row, and {int(squares.sum())} as kept whatever their score is."
    )
    return Picture("scores", title, alt, figure, tips, least_width=_least(a))


def mask(a: SentenceAttention) -> Picture:
    """The mask that results: kept (0), dropped (-inf), forbidden by the base mask (-inf)."""
    figure, axes = _matrix(a, 0.62)
    tips = {}
    dropped = a.allowed & ~a.kept
    for query, key in np.argwhere(a.allowed):
        kept = bool(a.kept[query, key])
        gid = f"{'kept' if kept else 'dropped'}.{query}.{key}"
        _cell(axes, int(query), int(key), palette.SPARSE if kept else palette.DROPPED, gid)
        tips[gid] = f"query {a.tokens[query]}, key {a.tokens[key]}: " + ("0, kept" if kept else "−∞, dropped")
    handles = [
        Patch(fc=palette.SPARSE, label=f"0, kept: {int(a.kept.sum())}"),
        Patch(fc=palette.DROPPED, label=f"−∞, dropped: {int(dropped.sum())}"),
        Patch(fc=palette.FORBIDDEN, hatch="////", label=f"−∞, base mask: {int((~a.allowed).sum())}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.1, handleheight=1.1,
                  handletextpad=0.4, columnspacing=1, fontsize=8)  # fmt: skip
    title = f"Mask, layer {a.layer}, head {a.head}"
    alt = (
        f"{a.size} by {a.size} matrix of the additive mask: {int(a.kept.sum())} cells are 0 and kept, "
        f"{int(dropped.sum())} are minus infinity because Sparse-K drops them, {int((~a.allowed).sum())} are "
        "minus infinity because the model's own mask forbids them."
    )
    return Picture("mask", title, alt, figure, tips, least_width=_least(a))


def _matrix(a: SentenceAttention, extra: float) -> tuple[Figure, Axes]:
    side = max(3.7, 0.165 * a.size + 0.9)
    figure = new_figure(side + extra, side + extra)
    axes = figure.add_subplot()
    axes.grid(False)
    axes.set_aspect("equal")
    axes.set_xlim(-0.5, a.size - 0.5)
    axes.set_ylim(a.size - 0.5, -0.5)
    size = 7 if a.size > 12 else 8.5
    words = [t if len(t) <= 14 else f"{t[:13]}…" for t in a.tokens]
    axes.set_xticks(range(a.size), words, rotation=90, fontsize=size)
    axes.set_yticks(range(a.size), words, fontsize=size)
    axes.tick_params(length=0, pad=2)
    axes.set_xlabel("key (token)")
    axes.set_ylabel("query (token)")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for query in range(a.size):
        for start, length in _runs(~a.allowed[query]):
            axes.add_patch(
                Rectangle(
                    (start - 0.5, query - 0.5), length, 1, fc=palette.FORBIDDEN, ec="none", hatch="////", lw=0
                )
            )
    return figure, axes


def _runs(row: Matrix) -> list[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(int)))
    return [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def _cell(axes: Axes, query: int, key: int, colour: str, gid: str) -> None:
    cell = Rectangle((key - 0.47, query - 0.47), 0.94, 0.94, facecolor=colour, linewidth=0)
    cell.set_gid(gid)
    axes.add_patch(cell)


def _least(a: SentenceAttention) -> int:
    return math.ceil(max(340, (12.5 if a.size <= 24 else 17) * a.size + 100))
