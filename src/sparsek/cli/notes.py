"""What is said on standard error beside results that could be taken for something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from ..bench.timing import are_wide, is_wide
from ..config import SparseKConfig
from ..kernels.break_even import prompt_is_dense

_NAMED: Final = 3  # results that a note names; of others it says how many


def note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def note_dense(
    configs: Sequence[SparseKConfig | None], contexts: Sequence[int], channels_on_gpu: int | None = None
) -> None:
    """Say on stderr when K is not used at one of these contexts: it would look as if it cost nothing.
    channels_on_gpu: of all heads of queries together, where attention is on a GPU."""
    selects = {config.select for config in configs if config is not None}
    if channels_on_gpu is not None and "auto" in selects:
        dense = sorted(
            {context for context in contexts if prompt_is_dense(context, context, channels_on_gpu)}
        )
        if dense:
            note(
                f"at {', '.join(map(str, dense))} tokens attention on a GPU is dense whatever K is, for that "
                "is faster (--select tile --min-context 0 uses K everywhere)"
            )
        return
    min_context = max((config.min_context for config in configs if config is not None), default=0)
    short = sorted({context for context in contexts if context < min_context})
    if short:
        note(
            f"at {', '.join(map(str, short))} tokens attention is dense whatever K is: min_context is "
            f"{min_context} (--min-context 0 uses K everywhere)"
        )


Ratio = tuple[float | None, float | None, float | None]  # median and quartiles, or nothing


def note_spread(results: Sequence[tuple[str, Sequence[float], Ratio]]) -> None:
    """Say of which results the repetitions differ much: name, times and ratio to dense of each."""
    wide = [name for name, times, ratio in results if are_wide(times) or _is_wide(ratio)]
    if wide:
        more = f" and {len(wide) - _NAMED} more" if len(wide) > _NAMED else ""
        note(
            "repetitions differ, the middle half of them by more than a tenth of the median, at "
            f"{'; '.join(wide[:_NAMED])}{more}: take more -r, or a machine that does nothing else"
        )


def _is_wide(ratio: Ratio) -> bool:
    middle, low, high = ratio
    return middle is not None and low is not None and high is not None and is_wide(middle, low, high)
