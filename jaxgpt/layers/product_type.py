"""`compute.dtype="auto"`: the type of products that this machine computes fastest.

Only what a CPU does with bfloat16 is measured: with AMX its products are about six times float32's, with
older instructions slower. Accelerators of the last years are made for bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import msgspec

from jaxgpt.config import Run, load_run
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, write_json
from jaxgpt.layers.linear import contract
from jaxgpt.target import Target

log = logging.getLogger(__name__)

Type = Literal["float32", "bfloat16"]
ROWS, WIDTH, ROUNDS = 1024, 512, 3
GAIN = 1.2
"""How many times as fast bfloat16 must be to be worth its rounding."""
CACHE = "~/.cache/jaxgpt/products.json"


class Seconds(TypedDict):
    """Of a product and its gradients, in each type."""

    float32: Annotated[float, msgspec.Meta(gt=0)]
    bfloat16: Annotated[float, msgspec.Meta(gt=0)]


def with_type(run: Run, target: Target | None = None) -> Run:
    """The run with a type in place of `auto`.

    A run that has begun keeps the type that its folder says, wherever it goes on.

    Args:
      run: the config.
      target: what the products are built for; None means this process's devices.
    """
    if run.compute.dtype != "auto":
        return run
    held = _held(run) or fastest(target or Target.of())
    return replace(run, compute=replace(run.compute, dtype=held))


def _held(run: Run) -> Any:
    """The type in the run's folder; None where there is none yet."""
    with contextlib.suppress(UserError):  # no run, or a damaged one: whoever claims the folder says so
        held = load_run(run.folder).compute.dtype
        return None if held == "auto" else held
    return None


def fastest(target: Target) -> Type:
    """The type whose products are fastest there, measured once per machine and version of JAX, and said."""
    if target.platform != "cpu":
        log.info("compute.dtype auto: bfloat16 on %s", target.device_kind)
        return "bfloat16"
    path, key = Path(CACHE).expanduser(), f"{_cpu()}, jax {jax.__version__}"
    seconds, how = _kept(path).get(key), f"kept in {path}"
    if seconds is None:
        seconds, how = measure(target), "measured now"
        with contextlib.suppress(OSError):  # no place to keep it: measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, _kept(path) | {key: seconds})
    chosen: Type = "bfloat16" if _everywhere(GAIN * seconds["bfloat16"] < seconds["float32"]) else "float32"
    times = seconds["float32"] / seconds["bfloat16"]
    log.info("compute.dtype auto: %s; bfloat16 is %.2g times as fast here (%s)", chosen, times, how)
    return chosen


def measure(target: Target) -> Seconds:
    """Seconds of a product with its gradients in each type: the least of a few, in turn."""
    key = jax.random.key(0)
    x, w = jax.random.normal(key, (ROWS, WIDTH)), jax.random.normal(key, (WIDTH, WIDTH))
    least: Any = {}
    programs = {name: _program(name, target) for name in Seconds.__annotations__}
    for turn in range(ROUNDS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, w))
            if turn:  # the first compiles
                least[name] = min(time.perf_counter() - start, least.get(name, float("inf")))
    return least


def _program(name: str, target: Target) -> Any:
    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(contract(x, w, 1, jnp.dtype(name), target)))

    return jax.jit(jax.grad(total, (0, 1)))


def _kept(path: Path) -> dict[str, Seconds]:
    with contextlib.suppress(UserError):  # not there, or damaged: measured again
        return read_json(path, dict[str, Seconds], "remove it")
    return {}


def _cpu() -> str:
    """The CPU: its name, its number of cores, and what it can do, which a virtual machine's name may hide."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    abilities = facts.get("flags", facts.get("Features", ""))
    digest = hashlib.sha256(abilities.encode()).hexdigest()[:8]
    return f"{facts.get('model name') or platform.machine()} ({digest}), {os.cpu_count()} cores"


def _everywhere(answer: bool) -> bool:
    """The first process's answer: processes of one run compute in one type."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(jnp.asarray(answer)))
