"""How vLLM packs keys and values in its cache on the CPU: learned by writing and reading, for it differs by
processor and by version, and is written down nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

_BASE: Final = 128  # numbers below it are exact in every floating dtype
# write(key, value, cache, slots): the host's own, of key and value [tokens, Hkv, D].
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Packing:
    """Where in a block of a head the numbers of its tokens are.

    Attributes:
        places: int64 [2, block * D]: of keys and of values, token by token.
    """

    places: torch.Tensor

    @classmethod
    def learn(cls, write: Write, cache: torch.Tensor) -> Packing | None:
        """The packing of a cache like `cache`, [blocks, Hkv, block, 2 D]; None where it is none that we can
        read: numbers that are rounded, or moved from block to block or from head to head."""
        if cache.ndim != 4 or cache.shape[3] % 2 or not cache.is_contiguous():
            return None
        _, heads, block, size = cache.shape
        scratch = cache.new_zeros(3, heads, block, size)
        slots = torch.arange(block) + block  # the block in the middle
        codes = torch.arange(block * size).view(2, block, 1, size // 2).expand(-1, -1, heads, -1)
        found = torch.zeros(heads, block * size, dtype=torch.int64)
        step = 1
        while step < block * size:
            digits = (codes // step % _BASE).to(cache.dtype)
            write(digits[0].contiguous(), digits[1].contiguous(), scratch, slots)
            found += scratch[1].reshape(heads, -1).long() * step
            step *= _BASE
        places = torch.empty_like(found[0])
        if not torch.equal(found[0].sort().values, torch.arange(block * size)):
            return None
        places[found[0]] = torch.arange(block * size)
        packing = cls(places.view(2, -1))
        return packing if packing._reads(write, scratch) else None

    def _reads(self, write: Write, scratch: torch.Tensor) -> bool:
        """Whether what the host writes, in any order, is read back as it was."""
        blocks, heads, block, size = scratch.shape
        slots = torch.randperm(blocks * block, generator=torch.Generator().manual_seed(0))
        shape = 2, blocks * block, heads, size // 2
        given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(scratch.dtype)
        write(given[0], given[1], scratch, slots)
        for which in range(2):
            out = scratch.new_empty(heads, blocks * block, size // 2)
            self.unpack(scratch, torch.arange(blocks), which, out)
            if not torch.equal(out[:, slots].transpose(0, 1), given[which]):
                return False
        return True

    def unpack(self, cache: torch.Tensor, pages: torch.Tensor, which: int, out: torch.Tensor) -> None:
        """The keys (`which` 0) or the values (1) of some blocks, `pages` int64 [n], into `out`
        [Hkv, n * block, D], of which each head is contiguous."""
        bits = {2: torch.int16, 4: torch.int32}[cache.itemsize]
        places = self.places[which].expand(len(pages), -1)
        for head, rows in enumerate(out):
            packed = cache[:, head].index_select(0, pages).view(len(pages), -1).view(bits)
            torch.gather(packed, 1, places, out=rows.view(len(pages), -1).view(bits))
