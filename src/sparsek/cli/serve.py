"""`sparsek serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from .. import _core
from ..config import SparseKConfig, budget_name, budget_range
from ..policy import fixed, resolve
from .options import SAMPLING, Budget, Budgets, Tokens, make_configs, refused_option, rule_options

if TYPE_CHECKING:
    from ..engines.server_log import Answer

_ELSEWHERE: Final = (
    "serve has no {option}: llama.cpp's own llama-server has it, and takes Sparse-K as `sparsek "
    "ggml-backend` shows"
)


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
    type=Tokens(2),
    help="Tokens of one request, with its answer.  [default: the model's context, at most 32768]",
)
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    metavar="K",
    help='Keys kept per query: a number, "auto", a share of the softmax like 0.002, or 0 for dense.',
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Requests answered at the same time.",
)
@click.option(
    "--api-key",
    "api_keys",
    metavar="KEY",
    multiple=True,
    envvar="LLAMA_API_KEY",
    help="Answer requests that carry KEY alone, but /health. Can be repeated; $LLAMA_API_KEY does the same.",
)
@click.option("--metrics", is_flag=True, help="Serve /metrics too, for Prometheus.")
@rule_options
@click.option("-t", "--threads", type=click.IntRange(1, 512), help="Threads.  [default: all processors]")
@refused_option(
    ["--embeddings", "--embedding", "--reranking", "--rerank", "--mmproj", "--props", "--slot-save-path"],
    _ELSEWHERE,
)
@refused_option(SAMPLING, "serve has no {option}: each request brings its own sampling, as its `temperature`")
@click.option("--debug", is_flag=True, help="Log what is done, and show tracebacks.")
def command(
    model: str | None,
    host: str,
    port: int,
    context: int | None,
    top_k: list[Budget] | None,
    parallel: int,
    api_keys: tuple[str, ...],
    metrics: bool,
    threads: int | None,
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """Answer requests over HTTP as OpenAI's interface has them, until Ctrl-C.

    It is llama.cpp's server: /v1/chat/completions, /v1/completions, /v1/models, /health and a page for the
    browser. Each of the --parallel requests has a context of its own; a request for `n` answers takes as many
    of these at once, so `n` is at most --parallel. Embeddings and reranking are refused (code 501):
    llama.cpp's own llama-server serves them.

    At the start it says whether Sparse-K will run, and then of every answer how many tokens of the prompt
    were read and how many came from the cache, how many were written, how fast, and whether with Sparse-K.

    \b
    Examples:
      sparsek serve
      sparsek serve -m model.gguf -c 16384 -k 96 --parallel 2
      sparsek serve --host 0.0.0.0 --api-key "$KEY" --metrics
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
    count = threads or _core.num_threads()
    server = library.start(
        found,
        config,
        host=host,
        port=port,
        context=length,
        parallel=parallel,
        threads=count,
        metrics=metrics,
        api_keys=_keys(api_keys),
        describe=lambda answer: _line(answer, config),
    )
    click.echo(
        f"{found.files.name}: {_budget(config, length)}, context {length}, slots {parallel}, "
        f"threads {count}\n"
        f"attention: {_attention(config, length, found.num_layers, library.takes_attention())}",
        err=True,
    )
    click.echo(f"listening on {server.listening_address}")
    library.serve_until_signal()


def _keys(given: tuple[str, ...]) -> tuple[str, ...]:
    for key in given:
        if not (key.isascii() and key.isprintable() and key.split() == [key]):
            raise click.UsageError(f"--api-key {key!r}: must be printable ASCII characters without spaces")
    return given


def _budget(config: SparseKConfig | None, context: int) -> str:
    """K or the share, with what "auto" is at the whole context."""
    if config is None:
        return "K 0"
    number = budget_range(fixed(config, context).to_dict())
    if config.min_share:
        return number
    return f"K auto ({number})" if budget_name(config) == "auto" else f"K {number}"


def _attention(config: SparseKConfig | None, context: int, num_layers: int, is_ours: bool) -> str:
    """Whether Sparse-K will run, and why not."""
    if config is None or config.top_k == 0:
        return "llama.cpp's own, dense, for K is 0"
    if not is_ours:
        return "llama.cpp's own, dense: Sparse-K does not take that of this model"
    if context < config.min_context:
        return (
            f"dense, for the context of {context} tokens is below min_context, {config.min_context} "
            "(--min-context 0 uses K everywhere)"
        )
    dense = [n for n in range(num_layers) if resolve(config, context, layer=n).keeps_all(context)]
    if len(config.dense_layers) == num_layers:
        return "dense, for dense_layers names every layer"
    if len(dense) == num_layers:
        return f"dense, for {_budget(config, context)} keeps all of the {context} tokens"
    begin = f" from {config.min_context} tokens of context on" if config.min_context else ""
    return f"Sparse-K{begin}; dense layers: {', '.join(map(str, dense)) or 'none'}"


def _line(answer: Answer, config: SparseKConfig | None) -> str:
    """What a log has of an answer."""
    now = time.strftime("%H:%M:%S")
    if answer.error is not None:
        return f"{now} refused: {answer.error}"
    if answer.broken_off:
        return f"{now} broken off by the client after {answer.tokens} tokens"
    return (
        f"{now} read {answer.read} tokens{_speed(answer.read, answer.read_seconds)}, "
        f"{answer.cached} from the cache; "
        f"wrote {answer.written}{_speed(answer.written - 1, answer.write_seconds)}; {_how(answer, config)}"
    )


def _speed(steps: int, seconds: float) -> str:
    return f" in {seconds:.2f} s ({steps / seconds:.1f} tokens/s)" if steps > 0 and seconds > 0 else ""


def _how(answer: Answer, config: SparseKConfig | None) -> str:
    if answer.sparse:
        return "Sparse-K"
    short = config is not None and config.top_k != 0 and answer.tokens < config.min_context
    return f"dense, below min_context {config.min_context}" if config is not None and short else "dense"
