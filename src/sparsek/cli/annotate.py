"""`sparsek annotate`: write the Sparse-K setting into a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import Budget, Budgets, make_configs, rule_options


@click.command("annotate")
@click.argument("source", metavar="IN.gguf")
@click.argument("target", metavar="OUT.gguf")
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    metavar="K",
    help='Keys kept per query: a number, "auto", or a share of the softmax like 0.002.',
)
@rule_options
@click.option("--remove", is_flag=True, help="Write a copy without sparsek.* metadata.")
@click.option("--force", is_flag=True, help="Replace what is written, if it exists.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(
    source: str,
    target: str,
    top_k: list[Budget] | None,
    remove: bool,
    force: bool,
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """Copy a GGUF file and write the setting into the copy, as sparsek.* metadata.

    The commands that load the copy then use its setting, unless options say otherwise. What is not given here
    takes its default, also where IN.gguf has a setting. The tensors and all other metadata stay as they are.

    Of a model in shards, IN.gguf is the first, as in NAME-00001-of-00003.gguf. The copy is one file; or as
    many shards, where OUT.gguf is named as the first of so many.

    \b
    Examples:
      sparsek annotate model.gguf model-sparse.gguf -k 64
      sparsek annotate model.gguf model-sparse.gguf --config tuned.json --force
      sparsek annotate model-sparse.gguf model-plain.gguf --remove
      sparsek annotate big-00001-of-00003.gguf sparse-00001-of-00003.gguf -k 64
    """
    from ..engines.annotate import annotate
    from ..engines.text import shown_name

    if remove and (
        top_k is not None or any(value is not None and value is not False for value in rule.values())
    ):
        raise click.UsageError("--remove takes no setting: leave out -k and the options of the rule")
    if top_k is not None and len(top_k) != 1:
        raise click.UsageError(f"-k {','.join(map(str, top_k))}: annotate takes one K")
    (config,) = [None] if remove else make_configs(top_k, None, **rule)
    if config is None and not remove:
        raise click.UsageError("-k 0 is dense attention, which needs no setting: --remove takes it out")
    made = annotate(Path(source), Path(target), config, force=force)
    for file in made.files:
        click.echo(f"wrote {shown_name(str(file))}")
    for name, value in (config.to_gguf_metadata() if config else {}).items():
        click.echo(f"  {name} = {str(value).removesuffix(',')}")
    if remove:
        click.echo(f"  removed: {', '.join(made.removed) or 'nothing, it has no sparsek.* metadata'}")
