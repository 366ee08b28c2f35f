"""`sparsek tune`: the cheapest configuration that meets a target."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from ..config import SparseKConfig, budget_range, budget_words
from ..engines.base import ENGINES
from ..engines.text import shown_name
from ..report.tables import with_error
from .options import (
    Tokens,
    check_outputs,
    common_options,
    device_option,
    load,
    make_config,
    model_option,
    resume_option,
    rule_options,
    text_option,
)
from .output import Column, Table, fields, write_file
from .progress import progress

if TYPE_CHECKING:
    from ..evaluate.tune import Point


COLUMNS: Final = [
    Column("step", lambda p: p.step, 10),
    Column("K", lambda p: budget_range(p.config), 10),
    Column("sinks", lambda p: str(p.config["sinks"]), right=True),
    Column("window", lambda p: str(p.config["window"]), right=True),
    Column("tail", lambda p: p.config["tail"], 8),
    Column("dense layers", lambda p: str(len(p.config["dense_layers"])), right=True),
    Column("keys", lambda p: f"{p.keys:.0f}", 5, right=True),
    Column("KL", lambda p: with_error(p.kl, p.kl_se), 15, right=True),
    Column("ppl ratio", lambda p: with_error(p.ppl_ratio, p.ppl_ratio_se), 15, right=True),
]
SPEED: Final = Column("speed-up", lambda p: f"{p.speedup:.2f}", right=True)


@click.command("tune")
@model_option
@device_option
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="transformers",
    show_default=True,
    help="Engine; llama.cpp's rounding hides what a single layer costs.",
)
@text_option
@click.option(
    "-c",
    "--context",
    type=Tokens(1),
    default=4096,
    show_default=True,
    help="Tokens to tune on; as many are held back.",
)
@click.option("--max-kl", type=float, metavar="NATS", help="Target: mean KL to dense attention at most this.")
@click.option("--max-ppl-ratio", type=float, metavar="X", help="Target: perplexity at most X times dense.")
@click.option("--min-speedup", type=float, metavar="X", help="Target: prompts at least X times as fast.")
@click.option("-o", "--output", metavar="FILE", help="Where the configuration goes, as JSON.")
@click.option("--records", metavar="FILE", help="Where the record of the run goes: all that was measured.")
@resume_option
@rule_options
@common_options
def command(
    model: str | None,
    device: str,
    engine: str,
    text: str | None,
    context: int,
    max_kl: float | None,
    max_ppl_ratio: float | None,
    min_speedup: float | None,
    output: str | None,
    records: str | None,
    resume: str | None,
    threads: int | None,
    seed: int,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """The cheapest configuration that meets a target: K by layer, dense layers, sinks, window, tail.

    It measures what each layer loses when it keeps few keys, spends the keys where they gain most, and says
    what the answer costs on text that it was not tuned on. A configuration meets the target when it does so
    with a standard error to spare; every fourth token is predicted. Cost is the number of keys that a query
    attends to, a mean over all layers and rows. The configuration goes into --config of every command, and
    its text into SparseKConfig.from_json.

    \b
    Examples:
      sparsek tune --max-kl 0.01 -o config.json
      sparsek tune -m model.gguf --text book.txt --max-ppl-ratio 1.01 -o config.json --resume tune.jsonl
      sparsek tune --context 8000 --min-speedup 1.5 -o config.json
      sparsek eval --engine transformers --config config.json
    """
    from ..bench.text import read_text
    from ..evaluate.journal import Journal
    from ..evaluate.quality import Windows
    from ..evaluate.tune import Tuner, steps

    target = _target(max_kl, max_ppl_ratio, min_speedup)
    if rule["min_share"] is not None:
        raise click.UsageError("--min-share is what tune finds, like K: leave it out")
    make_config(None, **rule)  # what is wrong in it shows before the model is loaded
    check_outputs(output, records, resume, inputs=(text, model, rule["config_file"]))
    name, words = read_text(text)
    opened = load(engine, model, threads, device=device)
    form = make_config(opened.model_config, **rule)
    kind = "speed" if min_speedup is not None else "quality"
    journal = Journal.of(resume, opened, words, context=context, target=kind)
    table = Table(COLUMNS if min_speedup is None else [*COLUMNS, SPEED])
    with progress("tune", steps(opened)) as advance:

        def say(point: Point, is_kept: bool) -> None:
            if is_kept:
                table.add(point)
            advance(said=_said(point))

        tuner = Tuner(
            opened,
            Windows(opened.encode(words), context),
            replace(form, top_k=64),
            target,
            name,
            journal,
            say,
        )
        record = tuner.tune()
    config = SparseKConfig.from_dict(record.config)
    click.echo(f"\n{_summary(record)}")
    click.echo(f"\n{config.to_json()}")  # whatever becomes of the files
    if records is not None:
        write_file(records, json.dumps(fields(record)) + "\n")
    if output is not None:
        write_file(output, config.to_json(indent=2) + "\n")
        click.echo(f"\nwrote {shown_name(output)}")


def _said(point: Point) -> str:
    """A line of a log."""
    speed = "" if point.speedup is None else f", speed-up {point.speedup:.2f}"
    k = budget_words(budget_range(point.config))
    return f"{point.step}, {k}: {point.keys:.0f} keys, KL {with_error(point.kl, point.kl_se)}{speed}"


def _target(max_kl: float | None, max_ppl_ratio: float | None, min_speedup: float | None) -> Any:
    from ..evaluate.tune import Target

    given = [x for x in (max_kl, max_ppl_ratio, min_speedup) if x is not None]
    if len(given) != 1:
        raise click.UsageError("give one target: --max-kl, --max-ppl-ratio or --min-speedup")
    return Target(max_kl, max_ppl_ratio, min_speedup)


def _summary(record: Any) -> str:
    tuned, held = record.tuned, record.held
    lines = [
        f"{record.target}: {tuned['keys']:.0f} keys a query",
        f"  tuned on   KL {with_error(tuned['kl'], tuned['kl_se'])}, perplexity ratio "
        f"{with_error(tuned['ppl_ratio'], tuned['ppl_ratio_se'])}"
        + ("" if tuned["speedup"] is None else f", speed-up {tuned['speedup']:.2f}"),
        f"  held back  KL {with_error(held['kl_mean'], held['kl_se'])}, perplexity ratio "
        f"{with_error(held['ppl_ratio'], held['ppl_ratio_se'])}"
        + ("" if record.met_held is None else f": the target is {'' if record.met_held else 'not '}met"),
    ]
    if record.uniform is not None:
        uniform = record.uniform
        lines.append(
            f"  one K      {budget_range(uniform['config'])} in every layer needs "
            f"{uniform['keys']:.0f} keys: {record.saved:.0%} saved"
        )
    if record.met_held is False:
        lines.append("To be on the safe side, tune for a stricter target, or on a longer --context.")
    return "\n".join(lines)
