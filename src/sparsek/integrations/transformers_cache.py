"""SparseKCache: a KV cache for Transformers that keeps a `KeyIndex` next to the keys of every layer.

    model.generate(..., past_key_values=SparseKCache(model.config))

The host's DynamicCache copies all keys and values at every step. Here they lie in memory with room to grow,
so a step costs what its new tokens cost.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..key_index import KeyIndex

_INDEX: Final = "_sparsek_index"  # an attribute of the tensor of keys that a layer hands out


def index_of(keys: torch.Tensor) -> KeyIndex | None:
    """The index that belongs to these keys, where they come from a SparseKCache."""
    return None if torch.compiler.is_compiling() else getattr(keys, _INDEX, None)


class SparseKCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache with a KeyIndex in every full-attention layer. All that a DynamicCache does (crop,
    reorder for beam search, batch selection) it does too. Sliding-window layers are the host's.

    Args:
        config: the model's configuration, `model.config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = SparseKLayer()


class SparseKLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [batch, heads, tokens, size], in memory with room, and their index."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index = KeyIndex()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values. O(new tokens) on average."""
        in_place = not (torch.is_grad_enabled() and key_states.requires_grad)
        if not in_place or torch.compiler.is_compiling():
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = keys = _append(self.keys, key_states)
            self.values = values = _append(self.values, value_states)
        setattr(keys, _INDEX, self.index)
        return keys, values

    def reset(self) -> None:
        super().reset()
        self.index.truncate(0)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.index.truncate(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.index.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.index.reorder(torch.arange(self._batch()).repeat_interleave(repeats).tolist())
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.index.reorder(torch.arange(self._batch())[torch.as_tensor(indices).cpu()].tolist())
        super().batch_select_indices(indices)

    def _batch(self) -> int:
        return int(self.keys.shape[0]) if self.get_seq_length() > 0 else 0


def _append(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`old` and `new` joined along the tokens: in place where the memory of `old` has room behind it."""
    if old.numel() == 0:
        old = new[:, :, :0]
    length, total = old.shape[2], old.shape[2] + new.shape[2]
    if not _has_room(old, total) or old.shape[:2] != new.shape[:2]:
        capacity = max(total, length * 3 // 2) + 64
        room = old.new_empty((*new.shape[:2], capacity, new.shape[3]))
        room[:, :, :length] = old
        old = room[:, :, :length]
    joined = old.as_strided((*new.shape[:2], total, new.shape[3]), old.stride(), old.storage_offset())
    joined.narrow(2, length, new.shape[2]).copy_(new)
    return joined


def _has_room(x: torch.Tensor, tokens: int) -> bool:
    """Whether x [B, H, T, D] is the beginning of a larger tensor of ours, for `tokens` tokens."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return False  # such memory cannot be written to any more
    batch, heads, _, size = x.shape
    head_stride = x.stride(1)
    ours = x.stride() == (heads * head_stride, head_stride, size, 1) and x.storage_offset() == 0
    return (
        ours
        and head_stride >= tokens * size
        and x.untyped_storage().nbytes() == (batch * heads * head_stride * x.itemsize)
    )
