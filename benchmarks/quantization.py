"""What few bits cost and bring: perplexity, size and speed of a run by every type and method.

    python benchmarks/quantization.py RUN --text FILE --work FOLDER [--only int8 ...]

Prints a table; the run, the text and the hardware stand above it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import jax

import jaxgpt
from benchmarks.common import machine
from jaxgpt.convert.quantize import quantize

WAYS = [
    ("int8", "rtn", "float"),
    ("int8", "gptq", "float"),
    ("int8", "rtn", "int8"),
    ("int8", "smoothquant", "int8"),
    ("fp8", "rtn", "float"),
    ("fp8", "gptq", "float"),
    ("int4", "rtn", "float"),
    ("int4", "awq", "float"),
    ("int4", "gptq", "float"),
    ("nf4", "rtn", "float"),
    ("nf4", "awq", "float"),
    ("nf4", "gptq", "float"),
]
"""Type, method, and the type of activations."""


def speed(folder: Path, rows: int, tokens: int, **how: str) -> float:
    """Tokens a second that are written greedily, the better of three calls after a first one that
    compiles.
    """
    model = jaxgpt.load(folder, **how)
    ids = [model.encode("Once upon a time")] * rows
    best = float("inf")
    for turn in range(4):
        begin = time.perf_counter()
        made = model.generate(ids, max_new_tokens=tokens, temperature=0)
        if turn:
            best = min(best, (time.perf_counter() - begin) / sum(len(one.ids) for one in made))
    return 1 / best


def files(folder: Path) -> int:
    """Bytes of a run's checkpoints."""
    return sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    print(f"{args.run} on {args.text}; {machine()['cpu']}, jax {jax.__version__}\n")
    print("| weights | activations | method | perplexity | MB | on disk | tokens/s at 1 | at 8 |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    first = True
    for to, method, activations in [way for way in WAYS if not args.only or way[0] in args.only]:
        out = args.work / f"{to}-{method}-{activations}"
        shutil.rmtree(out, ignore_errors=True)
        quantize(str(args.run), str(out), to=to, method=method, activations=activations, text=(args.text,))
        record = json.loads((out / "quantize.json").read_text())
        if first:
            for cache in ("float", "int8"):
                said = "float" if cache == "float" else "float, keys and values int8"
                row(said, "float", "", args.run, record, "before", args.tokens, cache)
            first = False
        row(to, activations, method, out, record, "after", args.tokens, "float")


def row(
    to: str, activations: str, method: str, folder: Path, record: dict, side: str, tokens: int, cache: str
) -> None:
    """Print a line of the table."""
    own = f"{record['perplexity'][side]:.4f}" if cache == "float" else ""
    speeds = [speed(folder, rows, tokens, cache=cache) for rows in (1, 8)]
    sizes = f"{record['bytes'][side] / 1e6:.2f} | {files(folder) / 1e6:.2f}"
    print(
        f"| {to} | {activations} | {method} | {own} | {sizes} | {speeds[0]:.0f} | {speeds[1]:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
