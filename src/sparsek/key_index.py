"""KeyIndex: the keys of a growing KV cache in 8 bits, kept next to it: makes steps of generation cheap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core


class KeyIndex:
    """What `attention(..., index=...)` remembers of `k` and `v` from call to call.

        index = KeyIndex()
        attention(q, k, v, config=config, index=index)         # the prompt
        attention(q_new, k_longer, v_longer, config=config, index=index)  # a step: O(new tokens)

    Choosing the best keys needs a pass over all of them. With an index that pass reads a quarter of their
    bytes, and of k and v only the chosen rows. The results are the same with and without it. On a GPU the
    index holds 4 bits of each number: choosing with it is not exact, and without it a step is dense.

    The index trusts that the first `length` tokens of k and v are those it has seen: call `truncate` where a
    cache was cropped or overwritten, `reorder` where batch entries changed places. It needs about 1.1 bytes
    for each number in k on the CPU, and about 1 on a GPU. Threads may share it, on the CPU. Saved (pickle,
    torch.save) it is an empty one: the first call after loading makes it again from the keys.
    """

    def __init__(self) -> None:
        self._core = _core.KeyIndex()
        self.gpu: Any = None  # the GPU kernel's own index, where it was used

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._core.length if self.gpu is None else int(self.gpu.length)

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self._core.nbytes + (0 if self.gpu is None else int(self.gpu.nbytes))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on.

        Raises:
            ValueError: `length` is negative.
        """
        if length < 0:
            raise ValueError(f"length = {length!r}: must be 0 or more")
        self._core.truncate(length)
        if self.gpu is not None:
            self.gpu.truncate(length)

    def reorder(self, batch_entries: Sequence[int]) -> None:
        """Batch entry i becomes what entry `batch_entries[i]` was, as in beam search."""
        entries = [int(i) for i in batch_entries]
        self._core.reorder(entries)
        if self.gpu is not None:
            self.gpu = self.gpu.reorder(entries)

    def __copy__(self) -> KeyIndex:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyIndex:
        twin = KeyIndex()
        twin._core = self._core.copy()
        twin.gpu = None if self.gpu is None else self.gpu.copy()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __repr__(self) -> str:
        return f"KeyIndex(length={self.length}, nbytes={self.nbytes})"
