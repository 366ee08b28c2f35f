"""The command line: one command a file, each a thin layer over a library of the same name."""

from __future__ import annotations

import logging
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Final

import click

from .._loading import INTERRUPTED, MESSAGE, raise_as_usual, stop_quietly
from .errors import FAILED, fail, is_expected
from .streams import discard_output

COMMANDS: Final = {
    "run": "generate text",
    "serve": "answer requests over HTTP",
    "exec": "run another program, in which Transformers knows Sparse-K",
    "bench": "speed of a model, dense beside Sparse-K",
    "bench-attention": "speed of the attention call alone",
    "eval": "what K costs in quality",
    "tune": "the cheapest setting that meets a target",
    "report": "pictures of it all, on one page",
    "annotate": "write the setting into a model file",
    "ggml-backend": "the llama.cpp backend, and how to load it",
    "info": "processor, kernels, engines and what auto would choose",
}


class _Group(click.Group):
    """Loads a command's module only when that command is used, so that --help needs nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{name.replace('-', '_')}", __name__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            like = " or ".join(map(repr, get_close_matches(args[0], COMMANDS)))
            hint = f"Did you mean {like}?" if like else "sparsek --help lists them."
            raise click.UsageError(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None  # before click prints an empty line

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="sparsek", message="%(prog)s %(version)s")
def cli() -> None:
    """Sparse-K attention: each query keeps its K strongest keys.

    Numbers of tokens can be written as 4k or 128k, in steps of 1024. For completion of commands and options
    put the line `eval "$(_SPARSEK_COMPLETE=bash_source sparsek)"` into ~/.bashrc; for zsh it is zsh_source.

    \b
    Examples:
      sparsek run -f chapter.txt -p "Summarise this." -k 64
      sparsek bench -p 4096,8000 -n 32 -k 0,64,auto
      sparsek eval --context 4096 -k 32,64,auto
    """


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 after an error (one line on stderr), 130 if interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        raise_as_usual()
        _log(debug)
        code = cli.main(given, prog_name="sparsek", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # while what goes wrong can still be told
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo(MESSAGE, err=True)
        return INTERRUPTED
    except (SystemExit, BrokenPipeError):  # the reader of our output went away; click makes an exit of it
        discard_output()
        return 0
    except Exception as error:
        if not is_expected(error):
            raise
        return fail(error, debug)
    finally:
        stop_quietly()


def _log(debug: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("sparsek").setLevel(logging.DEBUG if debug else logging.WARNING)
    # Where attention is dense, commands say so in a note of theirs.
    logging.getLogger("sparsek.transformers").setLevel(logging.DEBUG if debug else logging.ERROR)
