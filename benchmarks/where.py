"""Where the time of a training step of GPT-2 124M goes on a CPU, beside the least that this machine needs.

    python -m benchmarks.where [--dtypes float32 bfloat16] [--steps 3] [--out FILE]

For each part of the step: its time in a trace (`jaxgpt.profile`), and its roofline, the sum over instructions
of the longer of two times: for their FLOPs at the speed of the fastest product of the step's shapes, and for
their bytes, each array once, at the faster of reading memory and updating it in place. These speeds are
measured in the same call. Arrays that stay in a cache need less than their bytes say. Two threads.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.common import machine
from benchmarks.peaks import THREADS, product_speeds, read_bandwidth, update_bandwidth
from benchmarks.train_step import OurStep
from jaxgpt.profile.names import Name
from jaxgpt.profile.profiler import start_trace
from jaxgpt.profile.table import Instruction, Steps, traced_steps
from jaxgpt.runtime import keep_memory

PRODUCTS, ATTENTION, COPIES = "products of the layers", "attention", "copies and transposes in the layers"
NORMS, LOSS, OPTIMIZER, REST = "norms, activations, sums in the layers", "loss", "optimizer", "data, other"
PARTS = (PRODUCTS, ATTENTION, NORMS, COPIES, LOSS, OPTIMIZER, REST)
MOVES = ("copy", "transpose", "slice", "concatenate", "dynamic_slice", "dynamic_update_slice", "reshape")


def part_of(name: Name) -> str:
    """The part of the step that an instruction belongs to."""
    scopes = set(name.scope.split("/"))
    for scope in (LOSS, OPTIMIZER):
        if scope in scopes:
            return scope
    if scopes & {"scores", "softmax", "values"}:
        return ATTENTION
    if name.product:
        return PRODUCTS
    if not scopes & {"layers", "norm", "embedding"}:
        return REST
    return COPIES if name.what in MOVES else NORMS


def needs(instructions: list[Instruction], flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds for FLOPs, for bytes, and for the longer of both of each instruction.

    Args:
      instructions: of one part.
      flops: FLOP/s.
      bandwidth: bytes/s.
    """
    pairs = [((one.flops or 0.0) / flops, (one.bytes or 0.0) / bandwidth) for one in instructions]
    return {
        "by_flops": sum(a for a, _ in pairs),
        "by_bytes": sum(b for _, b in pairs),
        "roofline": sum(map(max, pairs)),
    }


def trace(ours: OurStep, steps: int) -> Steps:
    """What a trace of some steps says."""
    with tempfile.TemporaryDirectory() as folder:
        start_trace(Path(folder))
        seconds = ours.run(steps)
        jax.profiler.stop_trace()
        return traced_steps(Path(folder), ours.compiled.as_text(), seconds, steps)


def rows(found: Steps, flops: float, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each part, and one for the whole step."""
    parts, made = found.rows(part_of), []
    for part in PARTS:
        instructions = parts[part].instructions if part in parts else []
        seconds = sum(one.seconds for one in instructions) + (found.idle if part == REST else 0.0)
        made.append({"part": part, "seconds": seconds, **needs(instructions, flops, bandwidth)})
    unknown = [one for one in found.instructions if one.flops is None or one.bytes is None]
    whole = {name: sum(row[name] for row in made) for name in made[0] if name != "part"}
    return [*made, {"part": "step", **whole, "unknown_seconds": sum(one.seconds for one in unknown)}]


def show(made: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    print(f"\n{title}\n")
    print("| part | ms | share | ms by FLOPs | ms by bytes | roofline ms | times its roofline |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in made:
        least = row["roofline"]
        times = f"{row['seconds'] / least:.2f}" if least else "-"
        cells = (1e3 * row[name] for name in ("by_flops", "by_bytes", "roofline"))
        share = row["seconds"] / made[-1]["seconds"]
        line = " | ".join(f"{cell:,.1f}" for cell in cells)
        print(f"| {row['part']} | {1e3 * row['seconds']:,.1f} | {share:.1%} | {line} | {times} |")


def main(
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    steps: int = 3,
    batch: int = 2,
    length: int = 512,
    out: str | None = None,
) -> None:
    """Run the benchmark.

    Args:
      dtypes: compute types.
      steps: traced steps of each.
      batch: rows per batch.
      length: tokens per row.
      out: file to which the result is appended as a JSON line.
    """
    about: dict[str, Any] = machine()
    keep_memory()
    about |= {"read_GB_per_s": read_bandwidth(), "update_GB_per_s": update_bandwidth()}
    bandwidth = max(about["read_GB_per_s"], about["update_GB_per_s"])
    tables: dict[str, Any] = {}
    for dtype in dtypes:
        ours = OurStep(batch, length, dtype)
        N, D, F, V = batch * length, ours.model.width, ours.model.hidden, ours.model.vocab_size
        speeds = product_speeds([(N, D, D), (N, D, F), (N, F, D), (D, N, F), (N, D, V)], dtype)
        ours.run(1)
        plain = ours.run(steps) / steps
        made = rows(trace(ours, steps), 1e9 * max(speeds.values()), 1e9 * bandwidth)
        tables[dtype] = {"rows": made, "product_GFLOP_per_s": speeds, "untraced_seconds": plain}
        title = (
            f"GPT-2 124M training step, {batch} x {length}, {dtype}, {1e3 * plain:,.0f} ms without a trace; "
        )
        title += f"products at {max(speeds.values()):,.0f} GFLOP/s, memory at {bandwidth:.1f} GB/s"
        show(made, title)
        if unknown := made[-1]["unknown_seconds"]:
            print(f"\n{1e3 * unknown:.1f} ms are of instructions whose FLOPs or bytes are not known")
    print(f"\n`{' '.join(sys.argv)}`  load at the start {about['load']}")
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"command": " ".join(sys.argv), **about, "tables": tables}) + "\n")


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    tyro.cli(main)
