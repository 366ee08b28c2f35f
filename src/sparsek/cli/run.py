"""`sparsek run`: generate text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import click

from ..config import budget_name, budget_words
from ..engines.text import option_text, read_text_file, whole_characters
from .options import (
    SAMPLING,
    Budget,
    Budgets,
    Tokens,
    common_options,
    load,
    make_configs,
    model_options,
    refused_option,
    rule_options,
)
from .progress import status


@click.command("run")
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file; - is standard input.")
@click.option(
    "-n", "--tokens", type=Tokens(1), default=64, show_default=True, help="Most tokens to generate."
)
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    metavar="K",
    help='Keys kept per query: a number, "auto", a share of the softmax like 0.002, or 0 for dense.',
)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat format.")
@rule_options
@common_options
@refused_option(("-c", "--context"), "run has no {option}: its context is as long as the prompt and -n need")
@refused_option(
    SAMPLING,
    "run has no {option}: it is greedy, it takes the most likely token each time; `sparsek serve` samples as "
    "each request says",
)
def command(
    model: str | None,
    device: str,
    engine: str | None,
    prompt: str | None,
    file: str | None,
    tokens: int,
    top_k: list[Budget] | None,
    raw: bool,
    threads: int | None,
    seed: int,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """Generate text, greedily, and print the speed of prompt and generation.

    \b
    Examples:
      sparsek run -p "Why is the sky blue?"
      sparsek run -f chapter.txt -p "Summarise this." -n 128 -k 64
      sparsek run -f main.c --raw -k 0
    """
    text = _prompt(prompt, file)
    if top_k is not None and len(top_k) != 1:
        raise click.UsageError(f"-k {','.join(map(str, top_k))}: run takes one K")
    make_configs(top_k, None, **rule)  # what is wrong in them shows before the model is loaded
    opened = load(engine, model, threads, device=device)
    (chosen,) = make_configs(top_k, opened.model_config, **rule)
    ids = opened.encode(text) if raw else opened.encode_chat(text)
    needed = len(ids) + tokens
    if not ids:
        raise click.UsageError("the prompt is empty")
    if needed > opened.context_length:
        raise click.UsageError(
            f"the prompt has {len(ids)} tokens and {tokens} are to be generated: {needed} is more than the "
            f"model's context of {opened.context_length}"
        )
    start = time.perf_counter()
    prompt_seconds = 0.0
    produced = 0
    waiting = contextlib.ExitStack()
    waiting.enter_context(status(f"processing the prompt, {len(ids)} tokens"))

    def counted() -> Iterator[int]:
        nonlocal prompt_seconds, produced
        for token in opened.generate(ids, tokens, chosen):
            waiting.close()
            prompt_seconds = prompt_seconds or time.perf_counter() - start
            produced += 1
            yield token

    for part in whole_characters(opened.pieces(counted())):
        click.echo(part, nl=False)
    waiting.close()
    total = time.perf_counter() - start
    click.echo()
    steps = max(0, produced - 1)
    spent = total - prompt_seconds
    click.echo(
        f"prompt: {len(ids)} tokens, {len(ids) / (prompt_seconds or total):.1f} tokens/s | "
        f"generation: {produced} tokens, {steps / spent if steps and spent > 0 else 0:.1f} tokens/s | "
        f"attention: {_attention(chosen, len(ids))}",
        err=True,
    )


def _prompt(prompt: str | None, file: str | None) -> str:
    """File and prompt in one text, the file first."""
    parts = [] if file is None else [read_text_file(file, "-f")]
    if prompt is not None:
        parts.append(option_text(prompt, "-p"))
    text = "\n\n".join(parts)
    if not text.strip():
        raise click.UsageError("the prompt is empty: pass -p TEXT, -f FILE, or -f - for standard input")
    return text


def _attention(config: Any, prompt_tokens: int) -> str:
    if config is None:
        return "dense"
    if prompt_tokens < config.min_context:
        return f"dense while the context is below {config.min_context} tokens (--min-context)"
    return f"Sparse-K, {budget_words(budget_name(config))}"
