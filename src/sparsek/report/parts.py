"""The parts of the page: which pictures, and what is said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import budget_name, budget_words
from . import charts, sentence_figures
from .records import Record, Records
from .series import (
    Costs,
    FrontierPoint,
    budget_or_kept,
    budget_text,
    chosen_words,
    frontier_of_tuning,
    prompts,
    qualities,
    rule_words,
    some_by_share,
    sparse,
    speeds,
    speedups,
    with_mass,
)
from .svg import Picture, drawing
from .tables import with_error
from .tensors import SentenceAttention, mean_weight

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Material:
    """Everything the page is made of. Nothing else enters it.

    Attributes:
        points: of the frontier, those of the `eval` records. top_k: the K whose mass is shown.
        commands: by part, the line that reproduces it; `command` makes the whole page.
        environment: of this run.
    """

    model: str
    sentence: str
    attention: SentenceAttention
    costs: Costs
    records: Records
    points: list[FrontierPoint]
    top_k: int | str
    commands: dict[str, str]
    command: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One section. `text` is plain, as is the table; `source` says where the numbers come from."""

    name: str
    title: str
    text: str
    pictures: list[Picture]
    source: str = ""
    titles: Sequence[str] = ()
    rows: Rows = field(default_factory=list)
    command: str = ""


def parts(m: Material) -> list[Part]:
    """All parts but the environment, in their order; the drawings are made here."""
    with drawing():
        return [_web(m), _scores(m), _mask(m), _cost(m), _speed(m), _quality(m), _mass(m), _frontier(m)]


def _web(m: Material) -> Part:
    a = m.attention
    kept = mean_weight(a, a.kept)
    text = (
        f"Layer {a.layer}, head {a.head}. Each arc joins a query to a key before it; the stronger the "
        "arc, the more weight. With dense attention every query looks at every token up to itself; with "
        f"Sparse-K it keeps a few, which hold {kept:.0%} of the dense weight here. "
        "Point at a token, tap it or reach it with the arrow keys to see what it keeps."
    )
    chosen = f"This head was taken because, {a.chosen}. " if a.chosen else ""
    source = (
        f"{chosen}The sentence has {a.size} tokens, so the rule is scaled down to it: "
        f"{budget_words(budget_name(a.config))}, {rule_words(a.config)}. Weights of the right picture "
        "are those of the softmax over the kept keys."
    )
    return Part("web", "The web of attention", text, sentence_figures.webs(a), source, command=_of(m, "web"))


def _scores(m: Material) -> Part:
    a = m.attention
    text = (
        "A score is the product of a query and a key, and the softmax makes weights of a row of them. "
        "Squares mark the keys that Sparse-K keeps whatever their score is; dots mark, of "
        f"the others, the {chosen_words(a.config)}, in each row."
    )
    return Part("scores", "The scores, and the best of each row", text, [sentence_figures.scores(a)],
                command=_of(m, "web"))  # fmt: skip


def _mask(m: Material) -> Part:
    a = m.attention
    text = (
        "Added to the scores before the softmax: 0 leaves a score as it is, −∞ takes its weight away. The "
        "model's own mask, which forbids the future, stays as it is; Sparse-K only drops more of what that "
        f"allows, here {int((a.allowed & ~a.kept).sum())} of {int(a.allowed.sum())} cells."
    )
    return Part("mask", "The mask that results", text, [sentence_figures.mask(a)], command=_of(m, "web"))


def _cost(m: Material) -> Part:
    c = m.costs
    text = (
        "Dense attention puts half of N × N scores into the softmax of each head, Sparse-K about N × K. "
        "Both axes are logarithmic, so what grows with the square is a line twice as steep."
    )
    source = (
        f"Counted with the configuration of this page: {budget_words(m.top_k)}, {c.rule}. Choosing "
        "the keys looks at all pairs too, but in 8 bits; that pass is not counted here, its time is in the "
        "speeds below."
    )
    if c.min_context > c.lengths[0]:
        source += f" Prompts below {c.min_context:,} tokens (min_context) keep everything."
    rows = [
        [f"{n:,}", f"{ld:,}", f"{ls:,}", f"{md:,}", f"{ms:,}", f"{md / ms:.2f}"]
        for n, ld, ls, md, ms in zip(
            c.lengths, c.layer_dense, c.layer_sparse, c.model_dense, c.model_sparse, strict=True
        )
    ]
    titles = ["N (tokens)", "head, dense", "head, Sparse-K", "model, dense", "model, Sparse-K", "ratio"]
    return Part("cost", "N × N against N × K", text, charts.cost(c), source, titles, rows, _of(m, "cost"))


def _speed(m: Material) -> Part:
    used = prompts(m.records.bench)
    text = (
        "How fast a whole prompt is read, dense and with Sparse-K, and the ratio of the two. The rest of the "
        "model costs the same either way, so the gain grows with the prompt; a ratio below 1 is a loss."
    )
    pictures = charts.speed(speeds(used), speedups(used)) if used else []
    rows = [
        [
            r["model"],
            r["engine"],
            f"{r['n_prompt']:,}",
            f"dense ({r['backend']})" if r["config"] is None else budget_text(r),
            f"{r['avg_ts']:.1f}" + (f" ± {r['stddev_ts']:.1f}" if len(r.get("samples_ns", [])) > 1 else ""),
            "" if r["speedup"] is None else f"{r['speedup']:.2f}",
            str(len(r.get("samples_ns", [])) or ""),
        ]
        for r in used
    ]
    titles = ["model", "engine", "N (tokens)", "K", "tokens per second", "ratio", "repetitions"]
    source = _source(m, "bench", used, "Dense and sparse were timed in turns.")
    short = {
        r["config"]["min_context"]
        for r in used
        if r["config"] is not None and r["n_prompt"] < r["config"].get("min_context", 0)
    }
    if short:
        source += f" Below {max(short)} tokens (min_context) attention is dense whatever K is."
    if left := len(m.records.bench) - len(used):
        source += f" {left} records of generation are left out."
    return Part("speed", "Speed against the length of the prompt", text, pictures, source, titles, rows,
                _of(m, "bench"))  # fmt: skip


def _quality(m: Material) -> Part:
    used = sparse(m.records.eval)
    text = (
        "What K costs. Perplexity over dense is how much worse the text is predicted, 1 for no loss; KL is "
        "the mean distance of the next token's distribution from that of dense attention. Bars are standard "
        "errors."
    )
    ratios = qualities(used, "ppl_ratio", "ppl_ratio_se")
    pictures = []
    if ratios:
        divergences = qualities(used, "kl_mean", "kl_se")
        pictures = charts.quality(ratios, divergences, by_kept=some_by_share(used))
    rows = [
        [
            r["model"],
            r["text"],
            f"{r['context']:,}",
            budget_text(r),
            with_error(r["ppl_ratio"], r["ppl_ratio_se"]),
            with_error(r["kl_mean"], r["kl_se"]),
            "" if r.get("same_top") is None else f"{r['same_top']:.3f}",
        ]
        for r in used
    ]
    titles = ["model", "text", "context", "K", "perplexity, dense = 1", "KL (nats)", "same top token"]
    contexts = ", ".join(f"{n:,}" for n in sorted({r["context"] for r in used}))
    said = f"Windows of {contexts} tokens."
    if any(r["config"].get("min_context") == 0 for r in used):
        said += " With min_context 0: K is used at this length whatever the configuration's min_context is."
    if some_by_share(used):
        said += " Keys: what rows keep on average, with those that are always kept."
    if any(budget_or_kept(r) is None for r in used):
        said += " Records that do not say what K = auto was are in the table alone."
    return Part("quality", "Quality against K", text, pictures, _source(m, "eval", used, said), titles, rows,
                _of(m, "eval"))  # fmt: skip


def _mass(m: Material) -> Part:
    record = with_mass(m.records.eval, m.top_k, m.costs.rule)
    text = (
        "The share of the dense softmax that falls on the kept keys, for every layer and head: 1 means that "
        "nothing was lost. Where it is low, attention is spread over many keys."
    )
    if record is None:
        return Part("mass", "Retained mass by layer and head", text, [], "No record has it.")
    source = _source(
        m,
        "eval",
        [record],
        f"Rows sampled from {record['context']:,} tokens of {record['text']}; "
        f"{budget_words(budget_text(record))}, {rule_words(record['config'])}.",
    )
    rows = [
        [
            str(layer),
            "every key" if row is None else f"{sum(row) / len(row):.3f}",
            "" if row is None else f"{min(row):.3f}",
        ]
        for layer, row in enumerate(record["mass"])
    ]
    return Part("mass", "Retained mass by layer and head", text, [charts.mass(record)], source,
                ["layer", "mean over heads", "least head"], rows, _of(m, "eval"))  # fmt: skip


def _frontier(m: Material) -> Part:
    points = [*m.points, *(p for record in m.records.tune for p in frontier_of_tuning(record))]
    text = (
        "Each point is a configuration: down is better, left is cheaper. Keys are counted over all layers, "
        "so a layer that stays dense pays for every key."
    )
    if any(p.speedup is not None for p in points):
        text += " In the second chart, right is faster; only what was timed at the same length is in it."
    said = [
        f"The tuning in {', '.join(m.records.files.get('tune', []))} was of {r['model']} on {r['text']}, "
        f"{r['context']:,} tokens, target {r['target']}."
        for r in m.records.tune
    ]
    if not said:
        said = ["The points of a tuning appear here when the record that tune --records wrote is given."]
    if m.points:
        said.insert(0, "Points of this page are those of the part on quality.")
    rows = [
        [
            p.step,
            p.label,
            f"{p.keys:.0f}",
            with_error(p.kl, p.kl_se),
            "" if p.speedup is None else f"{p.speedup:.2f}",
        ]
        for p in points
    ]
    titles = ["step", "K", "keys (mean)", "KL (nats)", "speed, dense = 1"]
    pictures = charts.frontier(points) if points else []
    return Part("frontier", "The frontier of speed and quality", text, pictures, " ".join(said), titles, rows,
                _of(m, "tune"))  # fmt: skip


def _source(m: Material, kind: str, records: Sequence[Record], said: str) -> str:
    files = m.records.files.get(kind)
    if not records:
        return f"There is nothing to draw: no fitting record in {', '.join(files or [])}."
    engines = ", ".join(dict.fromkeys(f"{r['model']} in {r['engine']}" for r in records))
    begun = f"Read from {', '.join(files)}, not measured in this run" if files else "Measured in this run"
    return f"{begun}: {engines}. {said}"


def _of(m: Material, part: str) -> str:
    return m.commands.get(part, "")
