"""SparseKCache: a KV cache for Transformers that keeps a `KeyIndex` next to the keys of every layer.

    model.generate(..., past_key_values=SparseKCache(model.config))

The host's DynamicCache copies all keys and values at every step. Here they lie in memory with room to grow,
so a step costs what its new tokens cost. Who keeps a tensor of it is left alone: then the layer takes new
memory, as a DynamicCache does each time.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..key_index import KeyIndex
from .growing import Room

_SOURCE: Final = "_sparsek_source"  # an attribute of the tensor of keys that a layer hands out


class _Source:
    """The layer that a tensor comes from. A copy of the tensor, or one that was saved, comes from none."""

    def __init__(self, layer: SparseKLayer | None = None) -> None:
        self.layer = None if layer is None else weakref.ref(layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Source, ()


def index_of(keys: torch.Tensor) -> KeyIndex | None:
    """The index that belongs to these keys, where they come from a SparseKCache and are what it holds."""
    if torch.compiler.is_compiling():
        return None
    source: _Source | None = getattr(keys, _SOURCE, None)
    layer = None if source is None or source.layer is None else source.layer()
    return None if layer is None else layer.index_of(keys)


class SparseKCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache with a KeyIndex in every full-attention layer. All that a DynamicCache does (crop,
    reorder for beam search, batch selection, copies, saving) it does too, and keys may be put in the place of
    others or written to: then the index is made anew. Sliding-window layers are the host's.

    Args:
        config: the model's configuration, `model.config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = SparseKLayer()


class SparseKLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [batch, heads, tokens, size], and their index.

    They are in a `Room` of its own, or, where somebody put them there, in tensors that came from outside.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.index = KeyIndex()
        self._room: Room | None = None
        self._given: tuple[Any, Any] = None, None  # where there is no room
        self._is_indexed = False  # the index knows a beginning of the keys and values as they are
        self._newest: Any = None  # weak, the keys that were handed out last
        super().__init__(**kwargs)

    @property
    def keys(self) -> Any:
        return self._shown()[0]

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._give(keys, self._shown()[1])

    @property
    def values(self) -> Any:
        return self._shown()[1]

    @values.setter
    def values(self, values: Any) -> None:
        self._give(self._shown()[0], values)

    def _shown(self) -> tuple[Any, Any]:
        """Keys and values for somebody who may write to them, in ways that nobody can see."""
        self._is_indexed = False
        return self._given if self._room is None else self._room.tensors()

    def _give(self, keys: Any, values: Any) -> None:
        self._room, self._given, self._is_indexed = None, (keys, values), False

    def get_seq_length(self) -> int:
        if self._room is not None:
            return self._room.length if self._room.keys.numel() else 0
        keys, _ = self._given
        return int(keys.shape[-2]) if self.is_initialized and keys.numel() else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values. O(new tokens) on average."""
        if torch.compiler.is_compiling() or not Room.takes(key_states, value_states):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._knows_its_keys():
            self.index.truncate(0)
        if self._room is None:
            self._room = Room.of(self._given, key_states, value_states)
            self._given = None, None
        elif not self._room.is_free_for(key_states, value_states):
            self._room = Room.of(self._room.tensors(), key_states, value_states)
        keys, values = self._room.append(key_states, value_states)
        self._is_indexed, self._newest = True, weakref.ref(keys)
        setattr(keys, _SOURCE, _Source(self))
        return keys, values

    def index_of(self, keys: torch.Tensor) -> KeyIndex | None:
        """The index, if it knows these keys or will."""
        newest = self._newest is not None and self._newest() is keys
        return self.index if newest and self._knows_its_keys() else None

    def _knows_its_keys(self) -> bool:
        room = self._room
        return self._is_indexed and (room is None or room.is_as_left())

    def reset(self) -> None:
        super().reset()
        self.index.truncate(0)

    def crop(self, tokens_to_remove: int) -> None:
        room, known = self._room, self._knows_its_keys()
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        if room is not None:
            self._room, self._given, room.length = room, (None, None), length
        self.index.truncate(length if known else 0)
        self._is_indexed = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        known = self._knows_its_keys()
        super().reorder_cache(beam_idx)
        self._reorder_index(known, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        known, entries = self._knows_its_keys(), torch.arange(self._batch())
        super().batch_repeat_interleave(repeats)
        self._reorder_index(known, entries.repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        known, entries = self._knows_its_keys(), torch.arange(self._batch())
        super().batch_select_indices(indices)
        self._reorder_index(known, entries[torch.as_tensor(indices).cpu()].tolist())

    def _reorder_index(self, known: bool, entries: list[int]) -> None:
        if known:
            self.index.reorder(entries)
        else:
            self.index.truncate(0)
        self._is_indexed = True

    def _batch(self) -> int:
        keys = self._given[0] if self._room is None else self._room.keys
        return int(keys.shape[0]) if self.get_seq_length() > 0 else 0

    def __copy__(self) -> SparseKLayer:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseKLayer:
        known, room = self._knows_its_keys(), self._room
        twin: SparseKLayer = type(self).__new__(type(self))
        twin.__dict__.update({**self.__dict__, "_given": (None, None), "_newest": None, "_is_indexed": known})
        twin.index = copy.deepcopy(self.index, memo) if known else KeyIndex()
        if room is None:
            twin._given = copy.deepcopy(self._given, memo)
        else:
            twin._room = room.copy()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """To be saved: what the keys and values are, without room. The index is made anew."""
        tensors = self._given if self._room is None else self._room.tensors()
        given = tuple(None if x is None else x.clone() for x in tensors)
        empty = {"index": KeyIndex(), "_room": None, "_newest": None, "_is_indexed": False}
        return {**self.__dict__, **empty, "_given": given}
