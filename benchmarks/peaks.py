"""How fast this machine is at most: reading memory, and matrix products; two threads each."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

THREADS = 2


def seconds(way: Callable[[], object], rounds: int) -> list[float]:
    """The times of some calls, after one that is not counted."""
    way()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return times


def read_bandwidth(rounds: int = 9) -> float:
    """The most GB/s that a few ways of reading 256 MiB with two threads reach."""
    data = np.ones(2**26, np.float32)
    parts, pool, row = np.split(data, THREADS), ThreadPoolExecutor(THREADS), np.ones((1, 1024), np.float32)
    matrix, product = jax.numpy.asarray(data.reshape(1024, -1)), jax.jit(jax.numpy.matmul)
    ways = (
        lambda: list(pool.map(np.max, parts)),
        lambda: list(pool.map(lambda part: np.dot(part, part), parts)),
        lambda: product(row, matrix).block_until_ready(),
    )
    return max(data.nbytes / statistics.median(seconds(way, rounds)) / 1e9 for way in ways)


def update_bandwidth(rounds: int = 9) -> float:
    """GB/s, read and written together, of updating 256 MiB in place."""
    update, held = jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.ones(2**26)]

    def way() -> None:
        held.append(update(held.pop()).block_until_ready())

    way()
    return 2 * held[0].nbytes / statistics.median(seconds(way, rounds)) / 1e9


def product_speeds(shapes: Sequence[tuple[int, int, int]], dtype: str, rounds: int = 5) -> dict[str, float]:
    """GFLOP/s of the products of linear layers: x [M, K] by w [K, N], and those of the backward pass.

    Of each the fastest of some rounds: what the machine can do.
    """
    found, product = {}, jax.jit(jax.lax.dot_general, static_argnums=2)
    for M, K, N in shapes:
        x, w, y = jnp.ones((M, K), dtype), jnp.ones((K, N), dtype), jnp.ones((M, N), dtype)
        forms = {"x w": (x, w, ((1,), (0,))), "dy w^T": (y, w, ((1,), (1,))), "x^T dy": (x, y, ((0,), (0,)))}
        for name, (one, other, axes) in forms.items():
            way = functools.partial(product, one, other, (axes, ((), ())))
            best = min(seconds(lambda way=way: way().block_until_ready(), rounds))
            found[f"{name}, M {M}, K {K}, N {N}"] = 2 * M * K * N / best / 1e9
    return found
