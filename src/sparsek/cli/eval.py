"""`sparsek eval`: what K costs in quality."""

from __future__ import annotations

from typing import Any, Final

import click

from ..config import TopK
from .options import (
    Budgets,
    common_options,
    load,
    make_configs,
    model_options,
    note_dense,
    rule_options,
)
from .output import Column, output_option, progress, write_records

COLUMNS: Final[list[Column]] = [
    ("model", lambda r: r.model),
    ("text", lambda r: r.text),
    ("context", lambda r: str(r.context)),
    ("K", lambda r: "dense" if r.top_k == 0 and r.config is None else str(r.top_k)),
    ("kept", lambda r: "all" if r.kept_mean is None else f"{r.kept_mean:.0f}"),
    ("ppl dense", lambda r: f"{r.ppl_dense:.3f}"),
    ("ppl", lambda r: f"{r.ppl:.3f}"),
    ("ratio", lambda r: f"{r.ppl_ratio:.4f}"),
    ("KL", lambda r: f"{max(r.kl_mean, 0.0):.4f}"),
    ("same top", lambda r: f"{r.same_top:.3f}"),
    ("mass", lambda r: "" if r.mass_mean is None else f"{r.mass_mean:.3f}"),
]


@click.command("eval")
@model_options
@click.option("--text", metavar="FILE", help="UTF-8 text.  [default: Python's own manual]")
@click.option("--context", type=int, default=4096, show_default=True, help="Tokens per window.")
@click.option("--windows", type=int, default=1, show_default=True, help="Windows, one after the other.")
@click.option(
    "-k", "--top-k", type=Budgets(), help="K to measure; 0 is dense.  [default: the configuration's]"
)
@rule_options
@common_options
@output_option
def command(
    model: str | None,
    engine: str | None,
    text: str | None,
    context: int,
    windows: int,
    top_k: list[TopK] | None,
    threads: int | None,
    seed: int,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
    output: str,
    **rule: Any,
) -> None:
    """Perplexity and distance to dense attention, on a real text.

    Dense and sparse run over the same windows. KL is from the dense to the sparse distribution of the next
    token, in nats; mass is the share of the dense softmax that falls on the kept keys.

    \b
    Examples:
      sparsek eval
      sparsek eval --text book.txt --context 8192 -k 32,64,auto
      sparsek eval --context 4096 -k 64 --pure -o json
    """
    from ..bench.text import read_text
    from ..evaluate.quality import evaluate, passes

    make_configs(top_k, None, **rule)  # what is wrong in them shows before the model is loaded
    name, words = read_text(text)
    opened = load(engine, model, threads)
    configs = make_configs(top_k, opened.model_config, **rule)
    with progress("eval", passes(configs, windows)) as advance:
        records = evaluate(
            opened, configs, text=words, text_name=name, context=context, windows=windows, advance=advance
        )
    write_records(records, output, COLUMNS)
    note_dense(configs, [context])
