"""`sparsek serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

from typing import Any

import click

from ..config import TopK
from .notes import note_dense
from .options import Budgets, make_configs, rule_options


@click.command("serve")
@click.option("-m", "--model", metavar="PATH", help="GGUF file.  [default: embedded model]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port; 0 for any free one.",
)
@click.option(
    "-c",
    "--context",
    type=click.IntRange(2),
    help="Tokens of one request, with its answer.  [default: the model's context, at most 32768]",
)
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    metavar="K",
    help='Keys kept per query: a number, "auto", or 0 for dense.',
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Requests answered at the same time.",
)
@rule_options
@click.option("--threads", type=click.IntRange(1, 512), help="Threads.  [default: all processors]")
@click.option("--debug", is_flag=True, help="Log what is done, and show tracebacks.")
def command(
    model: str | None,
    host: str,
    port: int,
    context: int | None,
    top_k: list[TopK] | None,
    parallel: int,
    threads: int | None,
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """Answer requests over HTTP as OpenAI's interface has them, until Ctrl-C.

    It is llama.cpp's server: /v1/chat/completions, /v1/completions, /v1/models, /health and a page for the
    browser. Each of the parallel requests has a context of its own.

    \b
    Examples:
      sparsek serve
      sparsek serve -m model.gguf -c 16384 -k 96 --parallel 2
      curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    from ..engines import llama_server as library

    if top_k is not None and len(top_k) != 1:
        raise click.UsageError(f"-k {','.join(map(str, top_k))}: serve takes one K")
    found = library.read_model(model)
    (config,) = make_configs(top_k, found.config, **rule)
    if config is not None:
        config.check_layers(found.num_layers)
    length = found.context(context)
    server = library.start(
        found, config, host=host, port=port, context=length, parallel=parallel, threads=threads
    )
    note_dense([config], [length])
    click.echo(f"listening on {server.listening_address}")
    library.serve_until_signal()
