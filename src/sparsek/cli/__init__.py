"""The command line: one command a file, each a thin layer over a library of the same name."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Final

import click

COMMANDS: Final = {
    "run": "generate text",
    "serve": "answer requests over HTTP",
    "bench": "speed of a model, dense beside Sparse-K",
    "bench-attention": "speed of the attention call alone",
    "eval": "what K costs in quality",
    "tune": "the cheapest setting that meets a target",
    "report": "pictures of it all, on one page",
    "annotate": "write the setting into a model file",
    "ggml-backend": "the llama.cpp backend, and how to load it",
    "info": "processor, kernels, engines and what auto would choose",
}
# What a wrong input or a missing part raises; anything else is a defect and shows its traceback.
_EXPECTED: Final = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    MemoryError,
    OverflowError,
)
_FAILED: Final = 2
_INTERRUPTED: Final = 130
_LONGEST_MESSAGE: Final = 500


class _Group(click.Group):
    """Loads a command's module only when that command is used, so that --help needs nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{name.replace('-', '_')}", __name__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sparsek", message="%(prog)s %(version)s")
def cli() -> None:
    """Sparse-K attention: each query keeps its K strongest keys.

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
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("sparsek").setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        code = cli.main(given, prog_name="sparsek", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return _FAILED
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        print("sparsek: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except SystemExit:  # click's answer when the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        return _fail(_message(error))


def _is_expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and "memory" in str(error):  # PyTorch's way of saying MemoryError
        return True
    return isinstance(error, _EXPECTED) or type(error).__name__ == "VerificationError"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _fail(message: str) -> int:
    words = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[: _LONGEST_MESSAGE - 3]}..."
    print(f"sparsek: {line}", file=sys.stderr)
    return _FAILED
