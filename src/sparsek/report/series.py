"""Records as lines and points: what the charts draw, before it is drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import SparseKConfig, budget_range, budget_words
from ..policy import on_cpu
from . import tables
from .records import Record


@dataclass(frozen=True)
class Costs:
    """Scores that enter the softmax of a causal prompt, for each of `lengths` (tokens): of one head of one
    sparse layer, and of the whole model."""

    lengths: tuple[int, ...]
    layer_dense: tuple[int, ...]
    layer_sparse: tuple[int, ...]
    model_dense: tuple[int, ...]
    model_sparse: tuple[int, ...]
    rule: str
    min_context: int
    num_layers: int
    num_heads: int


@dataclass
class Line:
    """Points of one line, by rising x. `low` and `high` bound the error bars: or are y."""

    label: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    dense: bool = False

    def add(self, x: float, y: float, low: float | None = None, high: float | None = None) -> None:
        at = sum(other <= x for other in self.x)
        self.x.insert(at, x)
        self.y.insert(at, y)
        self.low.insert(at, y if low is None else low)
        self.high.insert(at, y if high is None else high)


@dataclass(frozen=True)
class FrontierPoint:
    """A configuration as the frontier has it. `keys`: a query attends to, mean over rows and all layers;
    `kl` in nats; `speedup` of a prompt over dense, None where it was not measured; `step`: what for;
    `line`: the points that differ in K alone have the same."""

    step: str
    label: str
    keys: float
    kl: float
    kl_se: float
    speedup: float | None
    line: str = ""


def prompts(records: Sequence[Record]) -> list[Record]:
    """The records of `bench` that are of prompts alone."""
    return [r for r in records if r["n_prompt"] and not r["n_depth"] and not r["n_gen"]]


def speeds(records: Sequence[Record]) -> list[Line]:
    """Tokens per second against prompt length; the error bar is the standard deviation."""

    def add(line: Line, r: Record) -> None:
        spread = r["stddev_ts"]
        line.add(r["n_prompt"], r["avg_ts"], r["avg_ts"] - spread, r["avg_ts"] + spread)

    return _bench_lines(prompts(records), add)


def speedups(records: Sequence[Record]) -> list[Line]:
    """Speed over dense against prompt length; the error bar is the quartiles."""

    def add(line: Line, r: Record) -> None:
        if r["speedup"] is not None:
            line.add(r["n_prompt"], r["speedup"], r["speedup_low"], r["speedup_high"])

    return [line for line in _bench_lines(prompts(records), add) if line.x]


def _bench_lines(records: Sequence[Record], add: Callable[[Line, Record], None]) -> list[Line]:
    beside = ""
    keyed = []
    for r in records:  # a sparse record follows the dense one of its test
        beside = r["backend"] if r["config"] is None else beside
        keyed.append(
            (
                {
                    "": "dense" if r["config"] is None else f"Sparse-K, {budget_words(r['top_k'])}",
                    "rule": rule_words(r["config"]),
                    "model": r["model"],
                    "engine": r["engine"],
                    "threads": f"{r['n_threads']} threads",
                    "beside": r["backend"] if r["config"] is None else beside,
                },
                r,
            )
        )
    return _lines(keyed, add)


def qualities(records: Sequence[Record], value: str, error: str) -> list[Line]:
    """A field of `eval` records against K, with its standard error; where some are by share, against the keys
    that rows keep. Those that do not say it are left out."""
    place = kept_on_average if some_by_share(records) else budget

    def add(line: Line, r: Record) -> None:
        spread = r[error] or 0.0
        k = place(r)
        if k is not None:
            line.add(k, r[value], r[value] - spread, r[value] + spread)

    return [line for line in _lines([(_eval_words(r), r) for r in sparse(records)], add) if line.x]


def _eval_words(r: Record) -> dict[str, str]:
    return {
        "": "Sparse-K",
        "rule": rule_words(r["config"]),
        "model": r["model"],
        "engine": r["engine"],
        "text": r["text"],
        "context": f"{r['context']} tokens",
        "where": f"in {r['where']}",
        "by": "by share" if r["config"] and budget(r) is None else "by K",
    }


def _lines(keyed: Sequence[tuple[dict[str, str], Record]], add: Callable[[Line, Record], None]) -> list[Line]:
    """One line for each set of words."""
    found: dict[tuple[str, ...], Line] = {}
    for label, (words, r) in zip(_labels(keyed), keyed, strict=True):
        add(found.setdefault(tuple(words.values()), Line(label, dense=r["config"] is None)), r)
    return list(found.values())


def _labels(keyed: Sequence[tuple[dict[str, str], Record]]) -> list[str]:
    """Of each record the first of its words and those that tell the lines apart."""
    differ = {
        name
        for dense in (False, True)
        for name in (keyed[0][0] if keyed else ())
        if len({words[name] for words, r in keyed if (r["config"] is None) == dense}) > 1
    }
    return [
        ", ".join(text for name, text in words.items() if text and (name == "" or name in differ))
        for words, _ in keyed
    ]


def sparse(records: Sequence[Record]) -> list[Record]:
    """Those with a configuration, which are not dense attention itself."""
    return [r for r in records if r["config"] is not None]


def budget(record: Record) -> float | None:
    """K as a number; a mean where it is given per layer. None by share, and where it was "auto" and the
    record, of an earlier version, does not say what that was."""
    if record["config"].get("min_share"):
        return None
    used = record.get("top_k_used") or record["config"].get("top_k", "auto")
    budgets = used if isinstance(used, (list, tuple)) else [used]
    return None if "auto" in budgets else statistics.fmean(budgets)


def kept_on_average(record: Record) -> float | None:
    """The keys that rows keep, where the record says it."""
    return record.get("kept_mean")


def budget_or_kept(record: Record) -> float | None:
    """`budget`, or by share `kept_on_average`. None where the record says neither."""
    k = budget(record)
    return kept_on_average(record) if k is None else k


def some_by_share(records: Sequence[Record]) -> bool:
    """Whether K alone does not say what each of these keeps."""
    return any(budget(r) is None and kept_on_average(r) is not None for r in sparse(records))


def budget_text(record: Record) -> str:
    """K as the record names it."""
    return tables.budget_text(record["top_k"], record.get("top_k_used"))


def chosen_words(config: SparseKConfig) -> str:
    """What a query chooses by score, as a phrase."""
    number = "" if config.top_k == "auto" else f"{budget_range({'top_k': config.top_k})} best "
    return f"{number}keys" + (f" that get {config.min_share:g} of the softmax" if config.min_share else "")


def rule_words(config: dict[str, Any] | SparseKConfig | None) -> str:
    """What is kept beside the top-K, as a phrase; "" for dense attention."""
    if config is None:
        return ""
    c = config if isinstance(config, SparseKConfig) else SparseKConfig.from_dict(config)
    parts = [
        f"{c.sinks} sink{'s' if c.sinks > 1 else ''}" if c.sinks else "",
        f"window {c.window}" if c.window else "",
        f"stride {c.stride}" if c.stride else "",
        f"tiles of {c.tile}" if c.select == "tile" else "",
        "centroid tail" if c.tail == "centroid" else "",
        f"{len(c.dense_layers)} dense layer{'s' if len(c.dense_layers) > 1 else ''}"
        if c.dense_layers
        else "",
    ]
    return ", ".join(part for part in parts if part) or "top-K alone"


def same_rule(one: dict[str, Any] | None, other: dict[str, Any] | None, context: int) -> bool:
    """Whether two configurations are the same at this context; below `min_context` one is dense."""
    if one is None or other is None:
        return one is other
    a, b = (on_cpu(SparseKConfig.from_dict(c)).to_dict() for c in (one, other))
    used = [c.pop("min_context") <= context for c in (a, b)]
    a.pop("check_finite"), b.pop("check_finite")
    return a == b and all(used)


def with_mass(records: Sequence[Record], top_k: int | str, rule: str) -> Record | None:
    """The record whose retained mass is shown: of the K and the rule asked for, or else of one of them."""
    shown = [r for r in sparse(records) if any(row is not None for row in r["mass"])]
    return max(
        shown, key=lambda r: (r["top_k"] == top_k) + 2 * (rule_words(r["config"]) == rule), default=None
    )


def frontier_of_run(
    records: Sequence[Record], bench: Sequence[Record], keys: Callable[[Record], float]
) -> list[FrontierPoint]:
    """Points of the `eval` records that say what K was, or what rows keep. `keys` counts the keys of one. The
    speed-up is that of the `bench` record of the same engine-independent rule, with a prompt as long as the
    context, where there is one."""
    points = []
    # Without its mass, how many layers there are is not known.
    counted = [r for r in sparse(records) if r["mass"] and budget_or_kept(r) is not None]
    for line, r in zip(_labels([(_eval_words(r), r) for r in counted]), counted, strict=True):
        speedup = next(
            (
                b["speedup"]
                for b in prompts(bench)
                if b["n_prompt"] == r["context"]
                and b["model"] == r["model"]
                and b["speedup"] is not None
                and budget(b) == budget(r)
                and same_rule(b["config"], r["config"], r["context"])
            ),
            None,
        )
        label = budget_words(budget_text(r))
        points.append(FrontierPoint("eval", label, keys(r), r["kl_mean"], r["kl_se"] or 0.0, speedup, line))
    return points


def frontier_of_tuning(record: Record) -> list[FrontierPoint]:
    """The points that a tuning walked; the last is its answer."""

    def point(p: dict[str, Any], step: str) -> FrontierPoint:
        k = budget_words(budget_range(p["config"]))
        return FrontierPoint(step, k, p["keys"], p["kl"], p["kl_se"], p["speedup"])

    return [*(point(p, p["step"]) for p in record["frontier"]), point(record["tuned"], "answer")]
