"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from .. import _core
from ..config import SparseKConfig, TopK, parse_layers
from ..engines import base
from ..engines.base import ENGINES, Engine
from ..engines.text import decode_text
from .progress import status

F = TypeVar("F", bound=Callable[..., Any])


Budget = TopK | float  # a float: keys by their share


class Budgets(click.ParamType[Any]):
    """A comma list of K: integers, "auto", or shares, which have a point in them. 0 is dense attention."""

    name = "k,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Budget]:
        if not isinstance(value, str):
            return list(value)
        return [self._budget(part.strip(), param, ctx) for part in value.split(",")]

    def _budget(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> Budget:
        if text == "auto":
            return "auto"
        if _is_number(text):
            return int(text)
        if not (_is_number(text.replace(".", "", 1)) and 0 < float(text) <= 1):
            kinds = 'an integer >= 0 (0 = dense), "auto", or a share of the softmax like 0.002'
            self.fail(f"{text!r} is not a K: use {kinds}", param, ctx)
        return float(text)


_THOUSANDS: Final = re.compile(r"(\d{1,12})[kK]", re.ASCII)


def _plain(text: str) -> str:
    """A number of tokens without its k, which stands for 1024."""
    found = _THOUSANDS.fullmatch(text)
    return str(1024 * int(found[1])) if found else text


class Tokens(click.IntRange):
    """A number of tokens within a range, as in 4096 or 4k."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            value = _plain(value.strip())
            if not _is_number(value.removeprefix("-")):
                self.fail(f"{value!r} is not a number of tokens, as in 4096 or 4k", param, ctx)
        return super().convert(value, param, ctx)


class Counts(click.ParamType[Any]):
    """A comma list of token counts, each at least `minimum`."""

    name = "n,..."

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        parts = [_plain(part.strip()) for part in value.split(",")]
        for part in parts:
            if not _is_number(part) or int(part) < self.minimum:
                self.fail(f"{part!r} is not a number of tokens >= {self.minimum}", param, ctx)
        return [int(part) for part in parts]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _stacked(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


SAMPLING: Final = ("--temp", "--temperature", "--top-p", "--min-p")


def refused_option(names: Sequence[str], why: str) -> Callable[[F], F]:
    """Options that users know from other programs and that are not there: an error, with `why`, in which
    {option} is the one that was given."""

    def refuse(option: str) -> Callable[[F], F]:
        def say(_ctx: click.Context, _param: click.Parameter, given: Any) -> None:
            if given is not None:
                raise click.UsageError(why.format(option=option))

        # A value may follow; where none does, none is asked for.
        return click.option(
            option, hidden=True, expose_value=False, is_eager=True, is_flag=False, flag_value="", callback=say
        )

    return _stacked(*map(refuse, names))


model_option = click.option(
    "-m", "--model", metavar="PATH", help="GGUF file or model directory.  [default: embedded model]"
)

text_option = click.option(
    "--text", metavar="FILE", help="UTF-8 text; - is standard input.  [default: Python's own manual]"
)

device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: the engines transformers and vllm on a GPU.",
)

model_options = _stacked(
    model_option,
    device_option,
    click.option(
        "--engine",
        type=click.Choice(list(ENGINES)),
        help="Engine.  [default: llama; for a model directory transformers]",
    ),
)

rule_options = _stacked(
    click.option(
        "--config", "config_file", metavar="FILE", help="Configuration as JSON; the options below change it."
    ),
    click.option(
        "--min-share",
        type=float,
        metavar="S",
        help="Of the K keys of -k only those with this share of the softmax, 0 to 1.",
    ),
    click.option("--pure", is_flag=True, help="Top-K alone: no sinks, window, tail or dense layers."),
    click.option("--sinks", type=int, metavar="N", help="First positions that are always kept."),
    click.option("--window", type=int, metavar="N", help="Last positions that are always kept."),
    click.option("--stride", type=int, metavar="N", help="Keep every N-th position; 0 for none."),
    click.option("--tail", type=click.Choice(["none", "centroid"]), help="Summary of what is dropped."),
    click.option(
        "--select",
        type=click.Choice(["auto", "query", "tile"]),
        help="Keys for each query alone, or one list for a tile of queries; auto: tiles on GPUs.",
    ),
    click.option("--tile", type=int, metavar="N", help="Queries of a tile: 32 or 64."),
    click.option("--dense-layers", metavar="L,...", help="Layers that keep everything, or none."),
    click.option("--min-context", type=Tokens(0), help="Shorter contexts keep everything."),
)

resume_option = click.option(
    "--resume",
    metavar="FILE",
    help="Keep what is finished in FILE (windows, tasks, configurations), and go on from it when the command "
    "runs again.",
)

common_options = _stacked(
    click.option("-t", "--threads", type=click.IntRange(1, 4096), help="Threads.  [default: all processors]"),
    click.option("--seed", type=int, default=0, show_default=True, help="For everything random."),
    click.option("--debug", is_flag=True, help="Log what is done, and show tracebacks."),
)


def make_configs(
    budgets: Sequence[Budget] | None, carried: SparseKConfig | None, **rule: Any
) -> list[SparseKConfig | None]:
    """One configuration per K or share of -k, None (dense attention) for 0; without -k the one of the rule
    options. What -k says is in the place of both, the K and the share that a file carries."""
    config = make_config(carried, **rule)
    share = rule.get("min_share")

    def with_budget(budget: Budget) -> SparseKConfig | None:
        if isinstance(budget, float):
            if share is not None:
                raise click.UsageError(
                    f"-k {budget:g} is a share, and --min-share {share:g} another: give one"
                )
            return replace(config, top_k="auto", min_share=budget)
        return None if budget == 0 else replace(config, top_k=budget, min_share=share or 0.0)

    return [config] if budgets is None else [with_budget(budget) for budget in budgets]


def make_config(
    carried: SparseKConfig | None,
    *,
    config_file: str | None,
    pure: bool,
    dense_layers: str | None,
    **fields: Any,
) -> SparseKConfig:
    """The configuration of the rule options: --config, or else what the model file carries, or else the
    defaults; then --pure; then the single options.

    Raises:
        OSError: the file cannot be read. ValueError: a value is out of range.
    """
    config = carried or SparseKConfig()
    if config_file is not None:
        text = decode_text(Path(config_file).read_bytes(), f"--config {config_file}")
        try:
            config = SparseKConfig.from_json(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_file}: {error}") from None
    if pure:
        config = replace(SparseKConfig.pure(config.top_k), min_share=config.min_share)
    changed = {name: value for name, value in fields.items() if value is not None}
    if dense_layers is not None:
        changed["dense_layers"] = parse_layers(dense_layers)
    return replace(config, **changed)


def check_folder(place: str) -> None:
    """Raises click.UsageError when the folder that `place` is to be in is not there."""
    if not Path(place).parent.is_dir():
        raise click.UsageError(f"no such directory: {str(Path(place).parent)!r}")


def check_outputs(*files: str | None, inputs: Sequence[str | None] = ()) -> None:
    """Files that are to be written can be, and are neither each other nor an input: said before the work.

    Raises:
        click.UsageError: one cannot, or is.
    """
    taken = [Path(file).resolve() for file in inputs if file]
    for file in files:
        if file is None:
            continue
        if not file or Path(file).is_dir():
            raise click.UsageError(f"this is a directory, give a file: {file!r}")
        check_folder(file)
        if Path(file).resolve() in taken:
            raise click.UsageError(f"this file has two uses: {file!r}")
        taken.append(Path(file).resolve())


def load(engine: str | None, model: str | None, threads: int | None, **options: Any) -> Engine:
    """Open the engine, with its `options`."""
    threads = use_threads(threads)
    with status("loading the model"):
        return base.open_engine(engine, model, threads=threads, **options)


def use_threads(threads: int | None) -> int:
    """Set PyTorch's threads, where there is PyTorch, to the number given, or that in SPARSEK_NUM_THREADS, or
    one per processor; returns it. A wrong SPARSEK_* variable is an error in every command that computes."""
    _core.isa()
    threads = threads or _core.num_threads()
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
    return threads
