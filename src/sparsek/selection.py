"""Selection: the keys that each query keeps, as lists of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import arrays
from .arrays import Array


@dataclass(frozen=True)
class Selection:
    """The kept keys of every query row.

    Attributes:
        indices: int32 [B, H, Tq, M], key positions in rising order, padded with -1 at the end.
        counts: int32 [B, H, Tq], how many of them are real.
        num_keys: Tk, the number of keys chosen from.
    """

    indices: Array
    counts: Array
    num_keys: int

    @classmethod
    def from_kept(cls, kept: Array, width: int | None) -> Selection:
        """From a boolean matrix [B, H, Tq, Tk]; M is `width`, or the most true elements of a row where that
        is more or `width` is None."""
        xp = arrays.namespace(kept)
        flat = kept.reshape(math.prod(kept.shape[:-1]), kept.shape[-1])
        counts = xp.sum(flat, -1)
        width = max(width or 0, int(counts.max()) if counts.shape[0] else 0)
        row, column = arrays.nonzero(flat)
        starts = xp.cumsum(counts, 0) - counts
        indices = arrays.full((flat.shape[0], width), -1, xp.int32, kept)
        indices[row, arrays.arange(row.shape[0], kept) - starts[row]] = arrays.cast(column, xp.int32)
        return cls(
            indices.reshape(*kept.shape[:-1], width),
            arrays.cast(counts, xp.int32).reshape(kept.shape[:-1]),
            kept.shape[-1],
        )

    def to_mask(self) -> Array:
        """Boolean [B, H, Tq, Tk], True where the key is kept."""
        xp = arrays.namespace(self.indices)
        mask = arrays.full((*self.indices.shape[:-1], self.num_keys), False, xp.bool, self.indices)
        batch, head, row, slot = arrays.nonzero(self.indices >= 0)
        mask[batch, head, row, arrays.cast(self.indices[batch, head, row, slot], xp.int64)] = True
        return mask
