"""`sparsek exec`: another program, with Sparse-K known to Transformers."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import click

from ..config import KEEP_ALL
from ..extras import how_to_install
from .options import Budget, Budgets, make_configs, rule_options


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-m", "--module", "is_module", is_flag=True, help="PROGRAM is a module, as in python -m.")
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    metavar="K",
    help='Keys kept per query: a number, "auto", a share of the softmax like 0.002, or 0 for dense.',
)
@rule_options
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    is_module: bool, top_k: list[Budget] | None, program: str, arguments: tuple[str, ...], **rule: Any
) -> None:
    """Run a Python program in which attn_implementation="sparsek" is known to Transformers.

    PROGRAM is a script, or with -m a module; its ARGUMENTS follow it. The options before it are for all
    models that it loads by that name, in place of what their config.json says. Without any, a model has what
    its config.json says, or else the default.

    \b
    Examples:
      sparsek exec -m lm_eval --model_args pretrained=MODEL,attn_implementation=sparsek --tasks lambada
      sparsek exec -k 64 -m lm_eval --model_args pretrained=MODEL,attn_implementation=sparsek --tasks lambada
      sparsek exec --config config.json script.py
    """
    if top_k is not None and len(top_k) != 1:
        raise click.UsageError(f"-k {','.join(map(str, top_k))}: exec takes one K")
    (config,) = make_configs(top_k, None, **rule)
    given = top_k is not None or any(value is not None and value is not False for value in rule.values())
    if find_spec("transformers") is None:
        raise ImportError(f"exec is for programs with Transformers: {how_to_install('transformers')}")
    text = (config or KEEP_ALL).to_json() if given else ""
    # A Python of its own, so that the program finds signals, streams and logging as Python has them.
    launch = [sys.executable, "-m", "sparsek.integrations.launch", text]
    os.execv(sys.executable, [*launch, *(["-m"] if is_module else []), program, *arguments])
