"""What all layers of a forward pass share, found out once: looking at values waits for the GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Found = TypeVar("Found")


@dataclass
class _Known(Generic[Found]):
    tensor: weakref.ref[torch.Tensor]
    version: int
    layer: int | None
    found: Found


class OncePerPass(threading.local, Generic[Found]):
    """Remembers what was found out about tensors, such as positions and masks, that a model hands to each of
    its layers."""

    def __init__(self) -> None:
        self._known: dict[int, _Known[Found]] = {}

    def get(self, x: torch.Tensor, layer: int | None, find: Callable[[], Found]) -> Found:
        """What `find` returns; as before when a later layer hands over the same tensor, unchanged. Layers
        without a number always look."""
        version = 0 if x.is_inference() else x._version  # inference tensors do not count their changes
        known = self._known.get(id(x))
        same = known is not None and known.tensor() is x and known.version == version
        if known is None or not same or known.layer is None or layer is None or layer <= known.layer:
            self._known = {key: old for key, old in self._known.items() if old.tensor() is not None}
            known = self._known[id(x)] = _Known(weakref.ref(x), version, layer, find())
        known.layer = layer
        return known.found
