"""The compiled core. Its settings come from the environment, which is read at every call."""

from typing import Any

def cpu_features() -> dict[str, bool]:
    """The features that kernels may use, by their names in /proc/cpuinfo, and whether both the processor
    and the operating system have them."""

def isa() -> str:
    """The instruction set that kernels use: the fastest this machine can run, or what SPARSEK_ISA says.

    Raises:
        ValueError: SPARSEK_ISA is none of available_isas().
    """

def available_isas() -> list[str]:
    """The instruction sets that this machine can run, from the slowest ("portable") to the fastest."""

def num_threads() -> int:
    """The default number of threads: the processors this process may use (affinity and control groups
    both count), or what SPARSEK_NUM_THREADS says.

    Raises:
        ValueError: SPARSEK_NUM_THREADS is no whole number from 1 to 1024.
    """

def use_openmp() -> bool:
    """From now on calls in this process run on the threads of its OpenMP, which a host may have bound to
    processors, and which would go on spinning beside ours. False where there is no OpenMP in the process."""

class KeyIndex:
    """See sparsek.KeyIndex. Threads may share it. Made anew where it does not fit k and v."""

    def copy(self) -> KeyIndex: ...
    def truncate(self, length: int) -> None: ...
    def reorder(self, batch_entries: list[int]) -> None: ...
    @property
    def length(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def attention(
    *,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    mask: Any | None,
    is_causal: bool,
    first_position: int,
    scale: float,
    softcap: float,
    top_k: int,
    sinks: int,
    window: int,
    stride: int,
    centroid_tail: bool,
    min_share: float,
    num_threads: int,
    index: KeyIndex | None,
) -> None:
    """Sparse-K attention into `out`; dense where `top_k` is the number of keys and `min_share` is 0.
    Nothing is checked.

    q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] of one dtype (float32, float16, bfloat16) with
    their last axis contiguous; out [B, H, Tq, Dv] likewise; mask bytes [1|B, 1|H, 1|Tq, 1|Tk], nonzero =
    allowed; index: of k and v, or None. Runs without the GIL; a signal handler's exception (Ctrl-C) ends the
    call.
    """

def select(
    *,
    q: Any,
    k: Any,
    indices: Any | None,
    counts: Any,
    mask: Any | None,
    is_causal: bool,
    first_position: int,
    scale: float,
    softcap: float,
    top_k: int,
    sinks: int,
    window: int,
    stride: int,
    min_share: float,
    whole_queries: int,
    num_threads: int,
) -> None:
    """The kept keys of every row: int32 `indices` [B, H, Tq, width], padded with -1, and their `counts`
    [B, H, Tq], which are all that is wanted where `indices` is None. `whole_queries`: of the call of which
    this is a part."""
