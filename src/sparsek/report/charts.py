"""Charts of what was counted and measured: cost, speed, quality, retained mass, frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..config import budget_words
from . import palette
from .records import Record
from .series import Costs, FrontierPoint, Line, budget_text
from .svg import Picture, new_figure

_WIDTH, _HEIGHT = 4.7, 3.4
_PLAIN: Final = FuncFormatter(lambda n, _: f"{n:.10g}")
_LONG_LABEL: Final = 34  # two columns of longer ones are wider than a figure
_LEAST_KL: Final = 1e-6  # rounding makes a mean of nothing negative; a logarithm cannot show that
_STEPS: Final = {
    "eval": ("o", palette.SPARSE, "Sparse-K"),
    "one K": ("s", palette.THIRD, "tuning: one K"),
    "form": ("^", palette.DENSE, "tuning: other forms"),
    "K by layer": ("D", palette.FOURTH, "tuning: K by layer"),
    "answer": ("*", palette.INK, "tuning: the answer"),
}


def cost(c: Costs) -> list[Picture]:
    """Scores against prompt length, of one head and of the model."""
    whole = f"The model: {c.num_layers} layers of {c.num_heads} heads"
    return [
        _cost("cost-layer", "One head of a sparse layer", c.lengths, c.layer_dense, c.layer_sparse),
        _cost("cost-model", whole, c.lengths, c.model_dense, c.model_sparse),
    ]


def _cost(
    name: str, title: str, lengths: Sequence[int], dense: Sequence[int], sparse: Sequence[int]
) -> Picture:
    figure, axes = _axes(title, "prompt N (tokens)", "scores in the softmax (number)")
    axes.plot(lengths, dense, "-o", color=palette.DENSE, ms=4, label="dense, N × N (causal: half)")
    axes.plot(lengths, sparse, "-s", color=palette.SPARSE, ms=4, label="Sparse-K, N × K")
    axes.set_xscale("log", base=2)
    _log_y(axes)
    _ticks_at(axes, lengths)
    figure.legend(loc="outside lower center", ncols=2)
    last, factor = lengths[-1], dense[-1] / sparse[-1]
    axes.text(
        0.98, 0.04, f"at {last:,} tokens\n{factor:.1f} times fewer", transform=axes.transAxes, ha="right"
    )
    alt = (
        f"Two lines on logarithmic axes for prompts of {lengths[0]:,} to {last:,} tokens. At {last:,} tokens "
        f"{dense[-1]:,} scores are in the softmax of dense attention and {sparse[-1]:,} in that of Sparse-K, "
        f"{factor:.1f} times fewer."
    )
    return Picture(name, title, alt, figure)


def speed(lines: Sequence[Line], ratios: Sequence[Line]) -> list[Picture]:
    """Tokens per second, and the ratio to dense, against prompt length."""
    first = _lines("speed", "Prompt speed", "prompt N (tokens)", "speed (tokens per second)", lines)
    if not ratios:
        return [first]
    return [
        first,
        _lines(
            "speed-ratio",
            "Speed over dense",
            "prompt N (tokens)",
            "speed, dense = 1 (ratio)",
            ratios,
            level=1.0,
        ),
    ]


def quality(ratios: Sequence[Line], divergences: Sequence[Line], *, by_kept: bool = False) -> list[Picture]:
    """Perplexity ratio and KL against K or the keys that rows keep, with standard errors."""
    x = "keys that a row keeps" if by_kept else "K (keys)"
    log = all(low > 0 for line in divergences for low in line.low)
    return [
        _lines(
            "quality-perplexity",
            "Perplexity over dense",
            x,
            "perplexity, dense = 1 (ratio)",
            ratios,
            level=1.0,
        ),
        _lines("quality-kl", "Distance to dense", x, "KL divergence (nats)", divergences, log=log),
    ]


def _lines(
    name: str,
    title: str,
    x: str,
    y: str,
    lines: Sequence[Line],
    *,
    level: float | None = None,
    log: bool = False,
) -> Picture:
    figure, axes = _axes(title, x, y)
    if level is not None:
        axes.axhline(level, color=palette.MUTED, lw=1, ls="--")
    colours = {True: iter(_cycle((palette.DENSE, palette.FOURTH))), False: iter(_cycle(palette.SERIES))}
    for line in lines:
        errors = [
            [max(y - low, 0.0) for low, y in zip(line.low, line.y, strict=True)],
            [max(high - y, 0.0) for high, y in zip(line.high, line.y, strict=True)],
        ]
        look = {"fmt": "-s" if line.dense else "-o", "color": next(colours[line.dense])}
        axes.errorbar(line.x, line.y, errors, ms=4, lw=1.4, capsize=3, label=line.label, **look)
    points = sorted({x for line in lines for x in line.x})
    if min(points) > 0 and len(points) > 1:
        axes.set_xscale("log", base=2)
    _ticks_at(axes, points)
    if log:
        _log_y(axes)
    elif level is None:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_PLAIN)
    else:
        axes.yaxis.set_major_formatter(_PLAIN)
    if len(lines) > 1 or lines[0].label != "Sparse-K":
        figure.legend(
            loc="outside lower center", ncols=2 if max(len(line.label) for line in lines) < 28 else 1
        )
    told = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{_short(b)} at {_short(a)}" for a, b in zip(line.x, line.y, strict=True))
        for line in lines
    )
    return Picture(name, title, f"{y}, against {x}. {told}.", figure)


def mass(record: Record) -> Picture:
    """The share of the dense softmax that falls on the kept keys, by layer and head."""
    rows = record["mass"]
    heads = max(len(row) for row in rows if row)
    values = [x for row in rows if row for x in row]
    figure = new_figure(max(_WIDTH, 0.3 * heads + 1.6), max(2.4, 0.155 * len(rows) + 1.2))
    axes = figure.add_subplot()
    axes.grid(False)
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    norm, colours = Normalize(min(values), max(max(values), min(values) + 1e-9)), colormaps["viridis"]
    tips = {}
    for layer, row in enumerate(rows):
        if row is None:
            axes.add_patch(
                Rectangle((-0.5, layer - 0.47), heads, 0.94, fc=palette.FORBIDDEN, hatch="////", lw=0)
            )
            continue
        for head, share in enumerate(row):
            cell = Rectangle((head - 0.47, layer - 0.47), 0.94, 0.94, fc=to_hex(colours(norm(share))), lw=0)
            cell.set_gid(f"mass.{layer}.{head}")
            tips[f"mass.{layer}.{head}"] = f"layer {layer}, head {head}: {share:.3f}"
            axes.add_patch(cell)
    every = 1 if heads <= 16 else 4
    axes.set_xticks(range(0, heads, every))
    axes.set_yticks(range(0, len(rows), 1 if len(rows) <= 12 else 5))
    axes.set_xlabel("head (number)")
    axes.set_ylabel("layer (number)")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.set_label("retained mass (share of 1)")
    bar.outline.set_visible(False)
    whole = [layer for layer, row in enumerate(rows) if row is None]
    if whole:
        figure.legend(
            handles=[Patch(fc=palette.FORBIDDEN, hatch="////", label="keeps every key")],
            loc="outside lower center",
        )
    layer, head = min(
        ((i, j) for i, row in enumerate(rows) if row for j in range(len(row))),
        key=lambda at: rows[at[0]][at[1]],
    )
    chosen = budget_words(budget_text(record))
    alt = (
        f"Heat map of {len(rows)} layers and {heads} heads at {chosen}: the mean is "
        f"{sum(values) / len(values):.3f}, the least {min(values):.3f} in layer {layer}, head {head}, the "
        f"most {max(values):.3f}."
        + (f" These layers keep every key: {', '.join(map(str, whole))}." if whole else "")
    )
    return Picture(
        "mass", f"Retained mass, {chosen}", alt, figure, tips, least_width=round(max(330, 22 * heads))
    )


def frontier(points: Sequence[FrontierPoint]) -> list[Picture]:
    """KL against kept keys and, of the points that have one, against speed-up."""
    found = [
        _frontier(
            "frontier-keys", "Quality against keys", "keys a query attends to (mean number)", points, "keys"
        )
    ]
    fast = [p for p in points if p.speedup is not None]
    if fast:
        found.append(
            _frontier(
                "frontier-speed", "Quality against speed", "prompt speed, dense = 1 (ratio)", fast, "speedup"
            )
        )
    return found


def _frontier(name: str, title: str, x: str, points: Sequence[FrontierPoint], value: str) -> Picture:
    figure, axes = _axes(title, x, "KL divergence (nats)")
    dashes = _cycle(("-", "--", ":", "-."))
    for step, line in dict.fromkeys((p.step, p.line) for p in points):
        of_step = sorted(
            (p for p in points if (p.step, p.line) == (step, line)), key=lambda p: getattr(p, value)
        )
        marker, colour, label = _STEPS.get(step, ("x", palette.MUTED, f"tuning: {step}"))
        label = line or label
        xs, ys = [getattr(p, value) for p in of_step], [max(p.kl, _LEAST_KL) for p in of_step]
        errors = [
            [min(p.kl_se, 0.9 * y) for p, y in zip(of_step, ys, strict=True)],
            [p.kl_se for p in of_step],
        ]
        look: dict[str, Any] = {
            "fmt": marker,
            "ms": 5,
            "mew": 0.5,
            "ls": next(dashes) if step == "eval" else "",
        }
        if step == "answer":  # a ring of a star, for it lies on the point that it was
            look |= {"ms": 12, "mew": 1.4, "mfc": "none"}
        axes.errorbar(xs, ys, errors, color=colour, lw=1, capsize=2, label=label, **look)
        if step == "eval":
            for p, px, py in zip(of_step, xs, ys, strict=True):
                axes.annotate(
                    p.label.removeprefix("K = "),
                    (px, py),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8,
                )
    _log_y(axes)
    if value == "keys":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_PLAIN)
    axes.margins(0.12)
    _, labels = axes.get_legend_handles_labels()
    long = max(map(len, labels)) > _LONG_LABEL
    if long:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(labels))
    figure.legend(loc="outside lower center", ncols=1 if long else 2)
    ends = min(points, key=lambda p: getattr(p, value)), max(points, key=lambda p: getattr(p, value))
    alt = f"{len(points)} points, KL divergence against {x}: from " + " to ".join(
        f"{_short(getattr(p, value))} with KL {_short(p.kl)} ({p.label})" for p in ends
    )
    return Picture(name, title, f"{alt}.", figure)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _ticks_at(axes: Axes, points: Sequence[float]) -> None:
    """Ticks at the points themselves, as long as they can be told apart."""
    kept: list[float] = []
    for point in points:
        if not kept or point >= 1.3 * kept[-1]:
            kept.append(point)
    axes.xaxis.set_major_locator(FixedLocator(kept[:: 1 + len(kept) // 9]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_PLAIN)


def _log_y(axes: Axes) -> None:
    """A logarithmic axis with numbers that are written out, up to where powers of ten read better."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: _power(y) if y >= 1e4 or y < 1e-3 else f"{y:g}")
    )
    low, high = axes.get_ylim()
    near = high < 30 * low  # few powers of ten are seen: the numbers between them are needed too
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda y, _: f"{y:g}" if near and f"{y:e}"[0] in "25" else "")
    )


def _power(y: float) -> str:
    exponent = f"{round(math.log10(y))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}"


def _cycle(colours: Sequence[str]) -> Any:
    while True:
        yield from colours


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
