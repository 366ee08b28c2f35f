"""Which requests of a batch of vLLM are prompts that Sparse-K takes, and what is left to the host.

A batch holds rows of several requests one after the other: whole prompts, chunks of prompts, and steps. How
long they are is told by numbers on the host's side alone, for to look at those on the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

# Rows of a chunk from which on choosing keys can gain; fewer are the host's, as are steps and drafts of
# several tokens.
MIN_ROWS: Final = 256


@dataclass(frozen=True)
class Prompt:
    """The rows [start, start + rows) of a batch: the last `rows` of a request's `keys` tokens so far."""

    request: int
    start: int
    rows: int
    keys: int


Rows = slice | torch.Tensor


@dataclass(frozen=True)
class Plan:
    """The prompts of a batch that are taken, and what is left to the host: its metadata for the other
    requests alone, and their rows in the batch; None where nothing is left."""

    prompts: tuple[Prompt, ...]
    rest: tuple[Any, Rows] | None


def prompts(common: Any, gains: Callable[[int, int], bool]) -> tuple[Prompt, ...]:
    """The prompts in a batch that are to be taken.

    Args:
        common: vLLM's CommonAttentionMetadata. Where it says less than is needed, or more than is known
            (masks that are not causal, parts of a context elsewhere), there are none.
        gains: whether it is worth while for so many rows over so many keys.
    """
    if common.max_query_len < MIN_ROWS or common.causal is not True or _has_unknown(common):
        return ()
    upper = getattr(common, "seq_lens_cpu_upper_bound", None)  # exact for prompts
    if upper is None or len(upper) < common.num_reqs:
        return ()
    starts, lengths = common.query_start_loc_cpu.tolist(), upper.tolist()
    found = []
    for request in range(common.num_reqs):
        start, rows, keys = starts[request], starts[request + 1] - starts[request], lengths[request]
        if MIN_ROWS <= rows <= keys and gains(rows, keys):
            found.append(Prompt(request, start, rows, keys))
    return tuple(found)


def others(common: Any, taken: tuple[Prompt, ...]) -> tuple[Any, Rows] | None:
    """CommonAttentionMetadata of the requests that are not taken, and their rows; None where all are."""
    of_prompts = {prompt.request for prompt in taken}
    starts = common.query_start_loc_cpu.tolist()
    left = [r for r in range(common.num_reqs) if r not in of_prompts and starts[r + 1] > starts[r]]
    if not left:
        return None
    device = common.query_start_loc.device
    sizes = torch.tensor([starts[r + 1] - starts[r] for r in left], dtype=common.query_start_loc_cpu.dtype)
    new_starts = torch.nn.functional.pad(sizes.cumsum(0, dtype=sizes.dtype), (1, 0))
    start, stop = starts[left[0]], starts[left[-1] + 1]
    rows: Rows = slice(start, stop)
    if stop - start != int(sizes.sum()):
        parts = [torch.arange(starts[r], starts[r + 1]) for r in left]
        rows = torch.cat(parts).to(device, non_blocking=True)
    requests = torch.tensor(left).to(device, non_blocking=True)
    upper = common.seq_lens_cpu_upper_bound[left]
    changed = {
        "query_start_loc": new_starts.to(device, non_blocking=True),
        "query_start_loc_cpu": new_starts,
        "seq_lens": common.seq_lens[requests],
        "seq_lens_cpu_upper_bound": upper,
        "num_reqs": len(left),
        "num_actual_tokens": int(sizes.sum()),
        "max_query_len": int(sizes.max()),
        "max_seq_len": int(upper.max()),
        "block_table_tensor": common.block_table_tensor[requests],
        "slot_mapping": common.slot_mapping[rows],
    }
    of_whole_batch = (
        "positions",
        "is_prefilling",
        "req_idx",
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    )
    for name in of_whole_batch:
        if getattr(common, name, None) is not None:
            changed[name] = None
    return common.replace(**changed), rows


def _has_unknown(common: Any) -> bool:
    """Whether the batch is more than causal attention of each request to its own tokens."""
    fields = (
        "dcp_local_seq_lens",
        "encoder_seq_lens",
        "mm_req_doc_ranges",
        "rswa_prefix_lens",
        "logits_indices_padded",
    )
    return any(getattr(common, name, None) is not None for name in fields)
