"""How JAX is set up in a process that computes: compilation cache, cluster, working memory."""

from __future__ import annotations

import ctypes
import os
import sys

import jax

from jaxgpt.cluster import HEARTBEAT, several

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of the settings in glibc's malloc.h."""


def set_up() -> None:
    """What every command that computes does before its first array."""
    _keep_programs()
    _join_cluster()
    keep_memory()


def _keep_programs() -> None:
    """The persistent compilation cache: a program is compiled once on a machine, not once a process."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxgpt/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _join_cluster() -> None:
    """Connect to the other processes where a launcher started several."""
    if not several():
        return
    # What it is for, a notice before a machine goes, our own handler of SIGTERM does; and until that
    # is there, JAX's would only keep the signal from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(index) if index else None,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    if jax.process_index() != 0:  # all of them have the same to say, and it is wanted once
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


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
