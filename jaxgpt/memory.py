"""Working memory of programs on a CPU: kept from step to step instead of mapped anew."""

from __future__ import annotations

import ctypes

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of the settings in glibc's malloc.h."""


def keep_memory() -> bool:
    """Keep what programs on the CPU free, for their next call; call it before the first JAX array.

    XLA allocates a program's working memory at every call, and glibc maps each large block and
    unmaps it again: the kernel then clears every page at every step, a fifth to a third of the
    time of a training step (benchmarks/results). Two things are needed: an allocator that hands
    nothing back, and programs that run in the thread that calls them, since glibc keeps large
    blocks in the main thread's heap alone. Elsewhere than on a CPU nothing changes.

    Returns:
      Whether the allocator took it: False where arrays live elsewhere or the C library is not glibc.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the backend starts
    if jax.default_backend() != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
