"""Compiles large configs for absent hardware, without running them, and writes results/aot_DATE.md.

    uv venv tpu && uv pip install --python tpu -e '.[tpu]'
    uv venv cuda && uv pip install --python cuda -e '.[cuda]'       # 4.4 GB
    python benchmarks/aot.py --tpu-python tpu/bin/python --cuda-python cuda/bin/python

Each row is compiled in its own process and stored in results/aot_DATE.json. The same command continues where
it stopped. `--only TEXT` selects the rows whose name contains TEXT; `--again` recompiles them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONG = ("--model.context", "32768", "--data.length", "32768")


@dataclass(frozen=True)
class Row:
    """One compilation, its figure before the work (issue 9), and the required figure."""

    config: str
    where: str
    flags: tuple[str, ...]
    before: str
    must: str
    holds: Callable[[Any], bool]
    program: str = "train"
    rows: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """Its key in the JSON record."""
        return " ".join(filter(None, (self.config, self.where, self.program, self.note)))


def no_square(report: Any) -> bool:
    return report.fits and not report.squares


def kernel_everywhere(report: Any) -> bool:
    """The backward kernel runs once per layer, whatever remat does to the forward kernel."""
    layers = {"gemma2_2b": 26, "gpt3": 96 * 5}[report.run]  # layers times microbatches
    backward = sum(n for name, n in report.kernels.items() if "dkv" in name or "ackward" in name)
    # All tokamax kernels have the same name: forward, forward again for remat, and two backward kernels.
    mosaic = sum(n for name, n in report.kernels.items() if "mosaic_gpu" in name)
    return no_square(report) and (backward == layers or mosaic == 4 * layers)


def lean_decoding(report: Any) -> bool:
    """No parameter or cache is gathered; at most 2 sums per layer and 3 per token; little sent at one row."""
    inside = [c for c in report.collectives if c.depth]
    sums = sum(c.runs for c in inside if c.kind == "all-reduce")
    # Only the logits, [B, V], may be gathered before one is chosen, or the chosen ids, [B].
    gathered = [a for c in inside if c.kind == "all-gather" for a in c.whole]
    logits_alone = all(a.size in (report.rows, report.rows * 128_256) for a in gathered)
    sent = sum(c.sent * c.runs for c in inside)
    return logits_alone and sums <= 2 * 32 + 3 and (report.rows > 1 or sent < 2e6)


def in_place(report: Any) -> bool:
    """Nothing like the cache is copied or sent; on TPUs its pages are read by the kernel."""
    cache = 2 * 32 * 128 * 2 * report.rows * 8192  # bytes of one of 8 heads
    held = report.memory["temporaries"] + report.memory["results"] < cache / 10
    kernels = sum(report.kernels.values()) == 32 or report.where.startswith("h")
    return report.fits and held and kernels and report.sent < cache / 10


def engine(where: str, program: str) -> Row:
    flags = ("--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "8")
    must = "the cache neither copied nor sent, the kernel in every layer on TPUs"
    return Row("llama3_8b", where, flags, "none", must, in_place, program, 32, "engine, tensor 8, B 32")


def sends_at_most(limit: float) -> Callable[[Any], bool]:
    return lambda report: report.fits and report.moved <= limit


def fits_under(ratio: float) -> Callable[[Any], bool]:
    return lambda report: report.fits and report.flops_ratio < ratio


def decoding(where: str, rows: int) -> Row:
    flags = ("--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "8")
    return Row(
        "llama3_8b",
        where,
        flags,
        "1.05 GB gathered per token",
        "no parameter or cache gathered, <= 2 sums per layer and 3 per token, < 2 MB per token at B 1",
        lean_decoding,
        "decode",
        rows,
        f"tensor 8, B {rows}",
    )


def packed(length: str, flags: tuple[str, ...]) -> Row:
    flags = ("--train.batch-size", "8", *flags)
    return Row(
        "llama3_8b", "h100:1x8", flags, "dense bias", "no T x T array", no_square, note=f"packed, T {length}"
    )


ROWS = (
    Row("llama3_8b", "v5p:4x4x4", (), "1,674 GB of all-reduce", "< 100 GB, all kinds", sends_at_most(100e9)),
    Row("llama3_8b", "v5e:16x16", (), "1,106 + 568 GB", "<= 96 GB", sends_at_most(96e9)),
    packed("8k", ()),
    packed("32k", LONG),
    Row("gemma2_2b", "v6e:8x8", (), "dense attention", "splash in every layer", kernel_everywhere),
    Row(
        "gemma2_2b",
        "h100:1x8",
        ("--train.batch-size", "32", "--compute.attention", "tokamax"),
        "dense attention",
        "a kernel in every layer",
        kernel_everywhere,
        note="tokamax",
    ),
    Row(
        "gpt3:175b",
        "v5p:8x8x8",
        (),
        "out of memory",
        "fits, kernels in every layer",
        kernel_everywhere,
        note="windows",
    ),
    Row(
        "gpt3:175b",
        "h100:64x8",
        (),
        "38.1 GiB",
        "fits, kernels in every layer",
        kernel_everywhere,
        note="windows",
    ),
    Row("mixtral_8x7b", "v5p:4x4x4", (), "out of memory", "fits, under 1.6x", fits_under(1.6)),
    Row("mixtral_8x7b", "h100:8x8", (), "8.4x FLOPs", "fits, under 1.6x", fits_under(1.6)),
    *(engine(where, program) for where in ("h100:1x8", "v5e:2x4") for program in ("chunk", "step")),
    *(decoding(where, rows) for where in ("h100:1x8", "v5e:2x4") for rows in (1, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu-python", default=sys.executable, help="a Python with jaxgpt[tpu]")
    parser.add_argument("--cuda-python", default=sys.executable, help="a Python with jaxgpt[cuda]")
    parser.add_argument("--only", default="", help="compile only rows whose name contains this text")
    parser.add_argument("--again", action="store_true", help="recompile rows that already have results")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="date of the results to continue")
    parser.add_argument("--keep", default="", help="folder to save the text of the compiled programs in")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(next(row for row in ROWS if row.name == args.one), args.keep)))
        return
    record = ROOT / "benchmarks" / "results" / f"aot_{args.date}.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for row in ROWS:
        if args.only not in row.name or (row.name in done and not args.again):
            continue
        print(f"{row.name} ...", flush=True)
        python = args.tpu_python if row.where[0] == "v" else args.cuda_python
        command = [python, __file__, "--one", row.name, "--keep", args.keep]
        tree = os.environ | {"PYTHONPATH": str(ROOT)}  # this checkout, not an installed jaxgpt
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=tree)
        if answer.returncode:
            print("  failed; its error is above", flush=True)
            continue
        done[row.name] = json.loads(answer.stdout.splitlines()[-1])
        record.write_text(json.dumps(done, indent=1) + "\n")
        record.with_suffix(".md").write_text(table(done, args.date))
        print(f"  {summary(done[row.name])}", flush=True)


def measure(row: Row, keep: str) -> dict[str, Any]:
    """Compile a row and return what the table and its readers need."""
    from jaxgpt import aot, config
    from jaxgpt.aot import hlo

    name, _, variant = row.config.partition(":")
    path = ROOT / "configs" / f"{name}.py"
    run = config.load_sweep(path)[variant] if variant else config.load(path)
    run = config.override(run, list(row.flags))
    prompt = 256 if row.program == "chunk" else 1024
    sizes = aot.Decoding(rows=row.rows, prompt=prompt, slots=run.model.context)
    folder = Path(keep) / row.name.replace(" ", "_") if keep else ""
    (report,) = aot.compile_for(run, row.where, [row.program], sizes, keep=folder)
    judged = argparse.Namespace(
        **{n: getattr(report, n) for n in dir(report) if n[0] != "_"}, run=name, rows=row.rows
    )
    inside = [c for c in report.collectives if c.depth]
    return {
        "flags": " ".join(row.flags),
        "mesh": report.mesh,
        "fits": report.fits,
        "needed": report.needed,
        "memory": report.memory,
        "flops_ratio": report.flops_ratio if report.model_flops else None,
        "product_flops": report.product_flops,
        "kernel_flops": report.kernel_flops,
        "kernels": report.kernels,
        "uncounted": report.uncounted,
        "sent": report.sent,
        "moved": report.moved,
        "traffic": hlo.traffic(report.collectives, "size"),
        "sums_in_loops": sum(c.runs for c in inside if c.kind == "all-reduce"),
        "squares": report.squares[:5],
        "largest": report.largest[:8],
        "seconds": report.seconds,
        "holds": row.holds(judged),
        "versions": {n: _version(n) for n in ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def moved(found: dict[str, Any]) -> str:
    """GB by kind and axes, without entries of 1 % or less."""
    parts = [
        f"{kind} {axes} {size / 1e9:.3g}"
        for kind, by_axes in found["traffic"].items()
        for axes, size in by_axes.items()
        if size > 0.01 * found["moved"]
    ]
    return "; ".join(parts)


def summary(found: dict[str, Any]) -> str:
    """A row's figures on one line."""
    state = "" if found["fits"] else " (does not fit)"
    return f"{found['needed'] / 2**30:.2f} GiB{state}, {found['moved'] / 1e9:.3g} GB, holds: {found['holds']}"


def table(done: dict[str, Any], date: str) -> str:
    """The results as a page."""
    lines = [
        f"# Programs compiled for absent hardware, {date}",
        "",
        "Made by `python benchmarks/aot.py --tpu-python ... --cuda-python ...`; nothing was run on a device.",
        "All figures are per device and per training step, or per decoded token. GiB: arguments, results,",
        "temporaries and code. FLOPs: those of products and attention kernels (every query with every key",
        "of its row), divided by the model's own. GB: size of the arrays that are gathered, scattered or",
        "summed, counted once per execution (loops multiplied by their iterations). Sent: what each device",
        "sends of them in rings, (N-1)/N of an array for a gather or a scatter and twice that for an",
        "all-reduce. Before: issue 9's figures.",
        "",
        "| config | where | mesh | GiB | FLOPs | GB by kind and axis | GB | sent | before | must | holds |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | --- | --- | --- |",
    ]
    for row in ROWS:
        if row.name not in done:
            continue
        found = done[row.name]
        title = " ".join(filter(None, (row.config, row.program if row.program != "train" else "", row.note)))
        mesh = ", ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
        peak = f"{found['needed'] / 2**30:.2f}" + ("" if found["fits"] else " (does not fit)")
        ratio = f"{found['flops_ratio']:.3f}" if found["flops_ratio"] and found["fits"] else ""
        cells = [title, row.where, mesh, peak, ratio, moved(found)]
        cells += [f"{found[measure] / 1e9:.3g}" for measure in ("moved", "sent")]
        cells += [row.before, row.must, "yes" if found["holds"] else "**no**"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Kernels, T x T arrays, flags and versions:", ""]
    for row in ROWS:
        if row.name in done:
            found = done[row.name]
            kernels = ", ".join(f"{name} x {n}" for name, n in found["kernels"].items()) or "none"
            versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if v)
            squares = ", ".join(found["squares"]) or "none"
            flags = f"`{found['flags']}`; " if found["flags"] else ""
            uncounted = f" (FLOPs not counted: {', '.join(found['uncounted'])})" if found["uncounted"] else ""
            lines.append(
                f"- {row.name}: {flags}kernels {kernels}{uncounted}; T x T: {squares}; "
                f"{found['seconds'].get('compile', '?')} s to compile; {versions}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
