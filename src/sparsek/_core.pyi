"""The compiled core. Its settings come from the environment, which is read at every call."""

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
