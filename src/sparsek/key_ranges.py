"""Masks as ranges: what each row sees, where that is one range of keys.

Padding, packed sequences, sliding windows and caches that are not filled yet make such masks. Two numbers a
row say the same as Tk of them, and a kernel can skip what is outside.
"""

from __future__ import annotations

import sys
from typing import Final

from .arrays import Array

_CHUNK: Final = 1 << 26  # elements of the mask that are looked at together


def key_ranges(mask: Array, *, first_position: int, is_causal: bool) -> tuple[Array, Array] | None:
    """The keys [start, stop) that each row sees: int32 [B, Tq] each, 0 and 0 for a row that sees nothing.

    None where the mask is of another kind: it differs by head, has gaps in a row, lets a row see positions
    after its own, or adds numbers other than 0 and -inf.

    Args:
        mask: a torch tensor [B, H, Tq, Tk], bool (True = allowed) or floating (added to the scores).
        first_position: that of row 0. is_causal: no row sees a later position than its own.
    """
    torch = sys.modules["torch"]
    batch, _, num_queries, _ = mask.shape
    if 0 in mask.shape:
        nothing = torch.zeros(batch, num_queries, dtype=torch.int32, device=mask.device)
        return nothing, nothing
    for axis in range(3):
        if mask.stride(axis) == 0:  # the same thing again and again
            mask = mask.narrow(axis, 0, 1)
    step = max(1, _CHUNK // (mask.shape[0] * mask.shape[1] * mask.shape[3]))
    parts = [_of_rows(rows) for rows in mask.split(step, 2)]
    starts, stops, good = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    after = torch.arange(num_queries, dtype=torch.int32, device=mask.device) + (first_position + 1)
    if is_causal:
        stops = torch.minimum(stops, after)
    seen = starts < stops
    starts, stops = torch.where(seen, starts, 0), torch.where(seen, stops, 0)
    good = good & (stops <= after.clamp(min=0)) & (starts == starts[:, :1]) & (stops == stops[:, :1])
    if not bool(good.all()):
        return None
    starts, stops = (x[:, 0].expand(batch, num_queries).contiguous() for x in (starts, stops))
    return starts, stops


def _of_rows(mask: Array) -> tuple[Array, Array, Array]:
    """Of each row the range of keys from the first seen on, and whether it sees these and no others."""
    torch = sys.modules["torch"]
    good = True
    if mask.dtype != torch.bool:
        forbidden = mask == -torch.inf
        good = (forbidden | (mask == 0)).all(-1)
        mask = ~forbidden
    seen = mask.view(torch.uint8)  # argmax has no bool
    count = seen.sum(-1, dtype=torch.int32)
    start = seen.argmax(-1).int()
    last = seen.shape[-1] - 1 - seen.flip(-1).argmax(-1)
    return start, start + count, good & ((count == 0) | (start + count == last + 1))
