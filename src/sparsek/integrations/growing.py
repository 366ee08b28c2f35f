"""Memory of keys and values with room to grow, which is written to only where nobody else sees it."""

from __future__ import annotations

from typing import Any

import torch

from ..arrays import is_recorded, wants_gradient


class Room:
    """The first `length` tokens of `keys` and `values`, [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv].

    All tensors that it hands out are views, new ones each time, so that the memory itself says whether
    somebody holds one.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length
        self._left_at = self._version()

    @staticmethod
    def takes(keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether such tokens can be copied into memory: nobody wants their gradient, and they have some."""
        return not wants_gradient(keys, values) and not is_recorded(keys, values)

    @classmethod
    def of(cls, old: tuple[Any, Any], keys: torch.Tensor, values: torch.Tensor) -> Room:
        """New memory with the `old` tokens in it, and room for these and some more."""
        length = old[0].shape[2] if old[0].numel() else 0
        capacity = max(length + keys.shape[2], length * 3 // 2) + 64
        with torch.inference_mode(False):  # memory that inference mode makes cannot be written to outside it
            made = [x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in (keys, values)]
        for room, x in zip(made, old, strict=True):
            if length:
                room[:, :, :length] = x
        return cls(made[0], made[1], length)

    def is_free_for(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether `append` would neither overflow nor write to memory that somebody else sees."""
        return (
            self.length + keys.shape[2] <= self.keys.shape[2]
            and all(
                room.shape[:2] == x.shape[:2] and room.dtype == x.dtype and room.device == x.device
                for room, x in ((self.keys, keys), (self.values, values))
            )
            and not any(map(_is_held, (self.keys, self.values)))
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all tokens."""
        total = self.length + keys.shape[2]
        self.keys[:, :, self.length : total] = keys
        self.values[:, :, self.length : total] = values
        self.length, self._left_at = total, self._version()
        return self.tensors()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def is_as_left(self) -> bool:
        """Whether nobody wrote to it after `append`, as far as PyTorch counts it."""
        return self._left_at == self._version()

    def copy(self) -> Room:
        """For another layer, with memory of its own."""
        keys, values = self.tensors()
        return Room.of((keys, values), keys[:, :, :0], values[:, :, :0])

    def _version(self) -> tuple[int, int]:
        return self.keys._version, self.values._version


def _holders(x: torch.Tensor) -> int:
    """How many tensors look at the memory of `x`; it counts itself and what asks."""
    storage = x.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def _is_held(x: torch.Tensor) -> bool:
    """Whether another tensor looks at the memory of `x`."""
    try:
        return _holders(x) > _ALONE
    except (AttributeError, RuntimeError):  # not to be known: as if
        return True


try:
    _ALONE = _holders(torch.empty(1))
except (AttributeError, RuntimeError):
    _ALONE = 0
