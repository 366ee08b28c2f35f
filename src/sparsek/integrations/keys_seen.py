"""How many keys the row sees that sees most. By this number a layer is sparse or dense (`min_context`), and
"auto" is what it is: not by how many keys a cache has room for, nor by those of other sequences beside."""

from __future__ import annotations

import torch

from ..problem import FORBIDDEN
from .once_per_pass import OncePerPass

_by_mask: OncePerPass[int] = OncePerPass()
_by_start: OncePerPass[int] = OncePerPass()


def keys_seen(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
    *,
    enough: int,
    layer: int | None,
) -> int:
    """Looks at masks once a pass, and not where so many keys are fewer than `enough` anyway. Steps on a GPU
    would wait for it, so there all keys of a cache count.

    Args:
        query: [B, H, Tq, D]. key: [B, Hkv, Tk, D].
        mask: bool [1|B, 1|H, Tq, Tk], True where a key is allowed, or numbers that are added to the scores.
        starts: int32 [B, Tq], of packed sequences the first key of each row's own.
        window: of this layer; only asked where there is no mask, for a mask says it better.
    """
    num_keys = key.shape[2]
    looks = num_keys >= enough and not (query.is_cuda and query.shape[2] == 1)
    if looks and mask is not None and mask.shape[-1] == num_keys:
        return _by_mask.get(mask, layer, lambda: _allowed(mask))
    most = num_keys if window is None else min(window, num_keys)
    if looks and starts is not None:
        most = min(most, _by_start.get(starts, layer, lambda: _longest(starts)))
    return most


def _allowed(mask: torch.Tensor) -> int:
    """Keys of the row that may see most."""
    seen = mask if mask.dtype == torch.bool else mask > FORBIDDEN
    # Twice as fast as counting bools.
    return int(seen.view(torch.uint8).sum(-1, dtype=torch.int32).max()) if seen.numel() else 0


def _longest(starts: torch.Tensor) -> int:
    """Keys of the row that is furthest in its sequence."""
    last = torch.arange(1, starts.shape[-1] + 1, dtype=starts.dtype, device=starts.device)
    return int((last - starts).max()) if starts.numel() else 0
