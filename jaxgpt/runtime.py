"""How JAX is set up in a process that computes: compilation cache, cluster, working memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jaxgpt.cluster import HEARTBEAT, place, several, told_while
from jaxgpt.errors import UserError, library_errors, require

try:
    import resource
except ImportError:  # Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of the settings in glibc's malloc.h."""
MOST_FILES = 65536
"""Open files that are enough for anybody; more only makes their tables large."""


def set_up() -> None:
    """What every command that computes does before its first array."""
    allow_files()
    _keep_programs()
    _join_cluster()
    require_platform()
    keep_memory()


def allow_files() -> None:
    """As many open files as the system lets this process have: a checkpoint opens many at once."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def require_platform() -> None:
    """Find the devices, or say which platforms there are.

    Raises:
      UserError: JAX_PLATFORMS names none that works here.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS is {asked!r}, and JAX found no such devices ({_first_line(error)}); allowed: "
            "cpu, cuda, rocm, tpu, or several with commas; unset it to take what is there."
        ) from None


def _keep_programs() -> None:
    """The persistent compilation cache: a program is compiled once on a machine, not once per process."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxgpt/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _join_cluster() -> None:
    """Connect to the other processes where a launcher started several.

    Raises:
      UserError: what the launcher says is malformed, or the others do not come.
    """
    if not several():
        return
    # What it is for, a notice before a machine goes, our own handler of SIGTERM does; and until that
    # is there, JAX's would only keep the signal from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    own = place()
    whom = f"the coordinator at {own.coordinator}" if own.coordinator and own.index else "the other processes"
    with (
        told_while(f"waiting for {whom}"),
        library_errors(
            "the processes of this job could not be connected",
            "look at the output of the others and at the launcher's variables (JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID say it by hand)",
        ),
    ):
        jax.distributed.initialize(
            num_processes=own.count, process_id=own.index, heartbeat_timeout_seconds=HEARTBEAT
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


def require_memory(needed: Mapping[jax.Device, int], what: str, fix: str) -> None:
    """Refuse what cannot be allocated, where the machine says what it has.

    Args:
      needed: bytes by device of this process.
      what: they are for.
      fix: what to do about it.

    Raises:
      UserError: a device has less, or the machine has for all its CPU devices together.
    """
    cpu = [size for device, size in needed.items() if device.platform == "cpu"]
    rooms = [(sum(cpu), machine_memory(), "on this machine")] if cpu else []
    for device, size in needed.items():
        stats = (None if device.platform == "cpu" else device.memory_stats()) or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            rooms.append((size, free, f"on each device ({device.device_kind})"))
    for size, free, where in rooms:
        require(
            free is None or size <= free,
            f"{what} need at least {size / 2**30:.4g} GiB of memory {where}, and "
            f"{(free or 0) / 2**30:.4g} GiB are free; {fix}.",
        )


@contextlib.contextmanager
def memory_errors(fix: str) -> Iterator[None]:
    """Say in one sentence that memory did not suffice, where only trying could tell.

    Raises:
      UserError: in place of what Python or JAX raise.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|(?i:out of memory)", str(error)):
            raise UserError(f"out of memory ({_first_line(error)}); {fix}.") from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def machine_memory() -> int | None:
    """Bytes that this process can still have, by the tightest of the limits; None where that is unknown."""
    limits = [_free(), _free_of_group(), _free_of_process()]
    return min((limit for limit in limits if limit is not None), default=None)


def _free() -> int | None:
    with contextlib.suppress(OSError, ValueError, LookupError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return sizes["MemAvailable"] + sizes["SwapFree"]
    return None


def _free_of_group() -> int | None:
    """Of the control group, as containers have one; what it keeps of files counts as free."""
    for name in ("memory.max memory.current", "memory/memory.limit_in_bytes memory/memory.usage_in_bytes"):
        limit, used = (Path("/sys/fs/cgroup") / part for part in name.split())
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            words = limit.with_name("memory.stat").read_text().split()
            kept = {key: int(size) for key, size in zip(words[::2], words[1::2], strict=True)}
            files = kept.get("inactive_file", 0) + kept.get("active_file", 0)
            return max(0, int(limit.read_text()) - int(used.read_text()) + files)
    return None


def _free_of_process() -> int | None:
    """Of a limit on the process's address space (`ulimit -v`)."""
    if resource is None:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    with contextlib.suppress(OSError, ValueError):
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return max(0, most - pages * os.sysconf("SC_PAGE_SIZE"))
    return None
