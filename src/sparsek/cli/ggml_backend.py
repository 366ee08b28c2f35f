"""`sparsek ggml-backend`: the llama.cpp backend, and how to load it."""

from __future__ import annotations

import click


@click.command("ggml-backend")
@click.option("--path", "only_path", is_flag=True, help="Print the path alone.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(only_path: bool, debug: bool) -> None:  # noqa: ARG001
    """Where the llama.cpp backend is, how each program loads it, and the variables it reads.

    Flash attention must be on or auto: Sparse-K takes its place.

    \b
    Examples:
      sparsek ggml-backend
      GGML_BACKEND_PATH=$(sparsek ggml-backend --path) llama-bench -m model.gguf
    """
    from ..integrations import llama_cpp_hosts as library

    path = library.installed_backend()
    click.echo(path)
    if only_path:
        return
    for host, lines in library.instructions(path).items():
        click.echo(f"\n{host}:")
        click.echo("\n".join(f"  {line}" for line in lines.splitlines()))
    variables = library.variables()
    width = max(map(len, variables))
    click.echo("\nVariables, read when the backend is loaded, and their defaults:")
    for name, value in variables.items():
        click.echo(f"  {name.ljust(width)}  {value}")
    click.echo("\nSPARSEK_CONFIG is a JSON file like those of --config; the other variables change it.")
    click.echo(
        "Where it works, a line on stderr says so: sparsek: Sparse-K is in use in layers ...; "
        "it names those where it is not, and why. "
        "That llama.cpp or llama-bench names the backend proves nothing. SPARSEK_STATS=1 tells "
        "at the end who computed what."
    )
