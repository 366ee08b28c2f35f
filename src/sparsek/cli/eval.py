"""`sparsek eval`: what K costs in quality."""

from __future__ import annotations

from typing import Any, Final

import click
from click.core import ParameterSource

from ..engines.base import attending_layers, no_attention
from ..report.tables import with_error
from .notes import note, note_dense
from .options import (
    Budget,
    Budgets,
    Tokens,
    common_options,
    load,
    make_configs,
    model_options,
    resume_option,
    rule_options,
    text_option,
)
from .output import Column, Records, Table, k_text, output_option, show
from .progress import progress, without_bar

COLUMNS: Final = [
    Column("model", lambda r: r.model),
    Column("engine", lambda r: r.engine),
    Column("text", lambda r: r.text),
    Column("context", lambda r: str(r.context), right=True),
    Column("K", k_text, 10),
    Column("kept", lambda r: "all" if r.kept_mean is None else f"{r.kept_mean:.0f}", 5, right=True),
    Column("ppl dense", lambda r: f"{r.ppl_dense:.3f}", right=True),
    Column("ppl", lambda r: f"{r.ppl:.3f}", 7, right=True),
    Column("ratio", lambda r: with_error(r.ppl_ratio, r.ppl_ratio_se), 15, right=True),
    Column("KL", lambda r: with_error(max(r.kl_mean, 0.0), r.kl_se), 15, right=True),
    Column("same top", lambda r: f"{r.same_top:.3f}", right=True),
    Column("mass", lambda r: "" if r.mass_mean is None else f"{r.mass_mean:.3f}", 5, right=True),
]


def _said(hit: bool | None) -> str:
    return "" if hit is None else "yes" if hit else "no"


RETRIEVAL_COLUMNS: Final = [
    Column("task", lambda r: r.task, 7),
    Column("depth", lambda r: "" if r.depth is None else f"{r.depth:.0%}", right=True),
    Column("K", k_text, 10),
    Column("dense log p", lambda r: f"{r.logprob_dense:.3f}", right=True),
    Column("sparse log p", lambda r: f"{r.logprob:.3f}", right=True),
    Column("dense says it", lambda r: _said(r.hit_dense)),
    Column("sparse says it", lambda r: _said(r.hit)),
]


@click.command("eval")
@model_options
@text_option
@click.option("-c", "--context", type=Tokens(1), default=4096, show_default=True, help="Tokens per window.")
@click.option("--windows", type=int, default=1, show_default=True, help="Windows, one after the other.")
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    help="K to measure, or shares like 0.002; 0 is dense.  [default: the configuration's]",
)
@click.option(
    "--where",
    type=click.Choice(["all", "prompt", "generation"]),
    default="all",
    show_default=True,
    help="Where Sparse-K works: everywhere, or only before or only within the last --generated tokens.",
)
@click.option(
    "--generated",
    type=Tokens(1),
    default=256,
    show_default=True,
    help="Tokens at the end of a window that count as generated, with --where prompt or generation.",
)
@click.option(
    "--retrieval",
    is_flag=True,
    help="Also: passkeys, key-value lookup and a repeated passage, in one window.",
)
@resume_option
@rule_options
@common_options
@output_option
def command(
    model: str | None,
    device: str,
    engine: str | None,
    text: str | None,
    context: int,
    windows: int,
    top_k: list[Budget] | None,
    where: Any,
    generated: int,
    retrieval: bool,
    resume: str | None,
    threads: int | None,
    seed: int,
    debug: bool,  # noqa: ARG001
    output: str,
    **rule: Any,
) -> None:
    """Perplexity and distance to dense attention, on a real text.

    Dense and sparse run over the same windows; after each there is a note of what is known so far. KL is
    from the dense to the sparse distribution of the next token, in nats; mass is the share of the dense
    softmax that falls on the kept keys; ± is the standard error. With --where prompt, Sparse-K works on
    the prompt and what follows is generated densely; with --where generation the other way round; either
    way only the generated tokens are scored. Kept are the keys of a row in a sparse layer. On llama.cpp a
    KL of some 0.003 is rounding, and no cost of K: its own dense attention (K = 0) has none, every other
    attention has it; --engine transformers has none.

    \b
    Examples:
      sparsek eval
      sparsek eval --text book.txt --context 8192 -k 32,64,auto
      sparsek eval --context 4096 --windows 4 -k 64 --pure -o json
      sparsek eval --context 8192 -k 64 --where prompt
      sparsek eval --context 2048 --min-context 0 -k 16,64 --retrieval
    """
    from ..bench.text import read_text
    from ..evaluate import quality
    from ..evaluate.journal import Journal
    from ..evaluate.retrieval import TASKS, check_context, retrieve

    make_configs(top_k, None, **rule)  # what is wrong in them shows before the model is loaded
    given = click.get_current_context().get_parameter_source("generated")
    if where == "all" and given is not ParameterSource.DEFAULT:
        raise click.UsageError("--generated needs --where prompt or --where generation")
    if retrieval and output == "csv":
        raise click.UsageError("-o csv holds one kind of record: leave out --retrieval, or take jsonl")
    name, words = read_text(text)
    opened = load(engine, model, threads, device=device)
    configs = make_configs(top_k, opened.model_config, **rule)
    for config in configs:
        if config is not None:
            config.check_layers(opened.num_layers)
    planned = quality.Windows(opened.encode(words), context, windows, where=where, generated=generated)
    planned.check(opened)
    if retrieval:
        check_context(opened, context)
    journal = Journal.of(resume, opened, words, context=context, generated=generated, seed=seed)
    total = quality.passes(configs, windows + (len(TASKS) if retrieval else 0))
    with Records(output, COLUMNS) as shown, progress("eval", total * context) as advance:
        records = quality.evaluate(
            opened,
            configs,
            planned,
            text_name=name,
            journal=journal,
            advance=advance,
            so_far=lambda records: _tell(records, windows),
        )
        for record in records:
            shown.add(record)
        if output == "md":
            _finish_table(where, generated, context, retrieval)
        if retrieval:
            retrieved = Table(RETRIEVAL_COLUMNS).add if output == "md" else shown.add
            for found in retrieve(
                opened,
                configs,
                text=words,
                text_name=name,
                context=context,
                seed=seed,
                journal=journal,
                advance=advance,
            ):
                retrieved(found)
    if any(r.config and r.kept_mean is None for r in records) and not attending_layers(opened):
        note(no_attention(opened.model))
    note_dense(configs, [context], opened.num_heads * opened.head_size if device == "cuda" else None)


def _tell(records: list[Any], windows: int) -> None:
    """What is known before all windows are done, should the run end there."""
    for r in records:
        ratio, kl = with_error(r.ppl_ratio, r.ppl_ratio_se), with_error(max(r.kl_mean, 0.0), r.kl_se)
        with without_bar():
            note(f"after {r.windows} of {windows} windows, K {k_text(r)}: ratio {ratio}, KL {kl}")


def _finish_table(where: str, generated: int, context: int, more_follows: bool) -> None:
    """What stands under the table, and an empty line where another one follows."""
    if where != "all":
        show(f"\nScored: the last {generated} of {context} tokens. Sparse-K: in the {where} alone.")
    if more_follows:
        show("")
