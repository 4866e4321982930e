"""`jaxgpt sweep CONFIG`: the runs of a config file's `sweep()` one after another, and how they compare."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shlex
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from jaxgpt import report
from jaxgpt.config import Run, UserError, load_sweep, override, require, require_known, to_json
from jaxgpt.files import write_json, write_text

log = logging.getLogger(__name__)
PROG = "jaxgpt sweep CONFIG [--only NAME ...]"
HELP = """Train the runs that a config file's `def sweep()` yields as (name, Run), one after another, each in
RUNS/FILE/NAME. After each, RUNS/FILE has the comparison as sweep.html, sweep.md and sweep.json. The
same command again goes on where it stopped. --only trains the runs named; other flags, which are
those of `jaxgpt train`, set a field in every run.
"""
DONE = ("finished", "patience")
Row = dict[str, Any]
"""What is known of one run, as `sweep.json` has it: `name`, `run`, `differs` (field to value), `state`
(one of `DONE`, stopped, failed, or waiting), `reason`, `parameters` and what `measure` finds."""


def sweep(args: list[str]) -> int:
    """Train every run of a config's `sweep()`, from where each stands; compare them in one folder.

    Exit codes: 0 done, 2 a mistake to mend, 3 a run failed, 75 stopped with everything saved.
    """
    args, only = split_only(args)
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            override(Run(name="NAME"), ["--help"], PROG, HELP)
        raise UserError("`jaxgpt sweep` needs a CONFIG first: a .py file with `def sweep()`.")
    runs = sweep_runs(args[0], args[1:])
    for name in only:
        require_known(name, runs, f"--only {name!r} is no run of {args[0]}")
    return run_sweep(runs, [name for name in runs if not only or name in only], shlex.join(args))


def split_only(args: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--only NAME ...`, and those names."""
    if "--only" not in args:
        return args, []
    at = args.index("--only")
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), args[at + 1 :]))
    require(bool(names), "--only needs the name of at least one run of the sweep.")
    rest, more = split_only(args[:at] + args[at + 1 + len(names) :])
    return rest, names + more


def sweep_runs(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Run]:
    """The runs of a config file by their names, all in the folder `RUNS/FILE`.

    Args:
      path: the config file.
      overrides: flags as of `jaxgpt train`, applied to every run.
    """
    given = load_sweep(path)
    base = to_json(next(iter(given.values())))
    runs: dict[str, Run] = {}
    for name, before in given.items():
        run = override(before, list(overrides), PROG) if overrides else before
        require(run.name == before.name, "--name cannot be set here: a sweep's runs have their own names.")
        first = next(iter(runs.values()), run)
        varied = differences(base, to_json(before)).keys() - differences(to_json(first), to_json(run)).keys()
        varied -= {"name", "runs"}
        require(
            not varied,
            f"--{min(varied, default='')} cannot be set here: it is what {name!r} of {path} differs in.",
        )
        home = first.runs if runs else str(Path(run.runs) / Path(path).stem)
        runs[name] = dataclasses.replace(run, name=name, runs=home)
    return runs


def run_sweep(runs: Mapping[str, Run], chosen: Sequence[str], words: str) -> int:
    """Train the chosen runs; after each, bring `sweep.json`, `sweep.md` and `sweep.html` up to date.

    Args:
      runs: all runs of the sweep.
      chosen: names of those to train.
      words: the command's arguments, for the page.

    Returns:
      The exit code; see `sweep`.
    """
    from jaxgpt.train.hooks import check_folder
    from jaxgpt.train.loop import STOPPED_BY_SIGNAL

    for name in chosen:  # before anything is written: the table of what is there may be all that is wanted
        check_folder(runs[name])
    folder = Path(next(iter(runs.values())).runs)
    rows, stopped = _held_rows(runs, folder), ""
    # Within a run a signal saves first (`StopSignal`); between two, nothing is left to be saved.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, name in enumerate(chosen, 1):
            if _skips(rows[name], runs[name]):
                log.info("%s is done", runs[name].folder)
            else:
                log.info("run %d of %d: %s", number, len(chosen), runs[name].folder)
                kept = {key: rows[name][key] for key in ("name", "run", "differs")}
                rows[name] = kept | _train(runs[name])
            _write(folder, list(rows.values()), words)
            if rows[name]["state"] == "stopped":
                stopped = rows[name]["reason"]
                break
    except KeyboardInterrupt:
        stopped = "stopped before a run had begun"
    finally:
        signal.signal(signal.SIGTERM, before)
    states = [rows[name]["state"] for name in chosen]
    done, failed = sum(state in DONE for state in states), states.count("failed")
    then = f"{stopped}; run the same command to go on" if stopped else f"see {folder / 'sweep.html'}"
    counts = f"{done} of {len(chosen)} runs done" + f", {failed} failed" * bool(failed)
    _print(list(rows.values()))
    print(f"{folder}: {counts}{_best_words([rows[name] for name in chosen])}; {then}")
    return STOPPED_BY_SIGNAL if stopped else 3 if failed else 0


def _train(run: Run) -> Row:
    """Train one run; how it ended and what it measured."""
    import jax

    from jaxgpt.checkpoint import SaveError
    from jaxgpt.models import parameter_counts
    from jaxgpt.train import loop

    row: Row = {"parameters": parameter_counts(run.model)["total"]}
    try:
        result = loop.train(run)
    except (UserError, loop.Diverged, SaveError, jax.errors.JaxRuntimeError) as error:  # last: no memory
        reason = str(error).strip().split("\n")[0]
        log.error("%s failed: %s", run.folder, reason)
        row |= {"state": "failed", "reason": reason}
        # A folder may be refused because it holds another run, whose numbers these are not.
        return row if isinstance(error, UserError) else row | measure(run)
    row |= {"state": result.reason, "reason": ""}
    if result.reason not in DONE:
        row |= {"state": "stopped", "reason": f"{result.reason} at step {result.step}"}
    return row | measure(run)


def measure(run: Run) -> Row:
    """What the metrics in a run's folder say.

    Returns:
      `steps`, `tokens`, `val_loss` (the lowest, nats a target) and its `val_bits_per_byte`, `val_accuracy`
      (the highest, of runs that are best by error), `seconds` (of training, without compiling and
      evaluating), `tokens_per_second` (the median) and `curve` ([tokens, validation loss] pairs);
      without what was not measured.
    """
    records: list[Row] = []
    with suppress(OSError):
        records = report.read_metrics(run.folder / "metrics.jsonl")
    logged = [r for r in records if "step_seconds" in r]
    if not logged:
        return {}
    tokens = run.train.batch_size * run.length
    steps = [0, *(r["step"] for r in logged)]
    spent = [(b - a) * r["step_seconds"] for a, b, r in zip(steps, steps[1:], logged, strict=False)]
    curve = [(step * tokens, loss) for step, loss in report.points(records, "val_loss") if loss == loss]
    found = {
        "steps": steps[-1],
        "tokens": steps[-1] * tokens,
        "seconds": round(sum(spent), 1),
        "tokens_per_second": round(median(r["tokens_per_second"] for r in logged)),
        "curve": curve,
    }
    if curve:
        best = min((r for r in records if r.get("val_loss") is not None), key=lambda r: r["val_loss"])
        found |= {name: best[name] for name in ("val_loss", "val_bits_per_byte") if name in best}
        accuracies = [a for _, a in report.points(records, "val_accuracy") if a == a]
        if run.train.best_by == "error" and accuracies:
            found["val_accuracy"] = max(accuracies)
    return found


def differences(first: Any, run: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of a config whose values are not those of another, by dotted names, as JSON."""
    if isinstance(first, dict) and isinstance(run, dict) and first["kind"] == run["kind"]:
        parts = (differences(first[name], run[name], f"{prefix}{name}.") for name in run)
        return {name: value for part in parts for name, value in part.items()}
    return {} if first == run else {prefix.removesuffix("."): run}


def _held_rows(runs: Mapping[str, Run], folder: Path) -> dict[str, Row]:
    """A row a run: as an earlier call left it if that was of the same config, else waiting."""
    held: dict[str, Row] = {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        held = {row["name"]: row for row in json.loads((folder / "sweep.json").read_bytes())["runs"]}
    first, rows = to_json(next(iter(runs.values()))), {}
    for name, run in runs.items():
        config = to_json(run)
        differs = {k: v for k, v in differences(first, config).items() if k != "name"}
        row = {"name": name, "differs": differs, "state": "waiting", "reason": ""}
        same = held.get(name, {}).get("run") == config
        rows[name] = (held[name] | {"differs": differs}) if same else row | {"run": config}
    return rows


def _skips(row: Row, run: Run) -> bool:
    """Whether a run is done and its folder still there; all processes of a cluster take one answer."""
    import jax
    import numpy as np

    done = row["state"] in DONE and (run.folder / "config.json").is_file()
    if jax.process_count() == 1:
        return done
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(done)))


def _best_words(rows: list[Row]) -> str:
    if right := [r for r in rows if "val_accuracy" in r]:
        best = max(right, key=lambda r: r["val_accuracy"])
        return f", highest validation accuracy {best['val_accuracy']:.4f} ({best['name']})"
    best = min((r for r in rows if "val_loss" in r), key=lambda r: r["val_loss"], default=None)
    return f", lowest validation loss {best['val_loss']:.4f} ({best['name']})" if best else ""


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [_cells(row, rows) for row in rows]
    columns = [c for c in shown[0] if c in (*WORDS, *MEASURED) and any(cells[c] != "–" for cells in shown)]
    table = Table(*columns)
    for column in table.columns:
        column.justify = "left" if column.header in WORDS else "right"
    for cells in shown:
        table.add_row(*(cells[c] for c in columns))
    Console().print(table)


# ---------------------------------------------------------------------------------- what is written


def _write(folder: Path, rows: list[Row], words: str) -> None:
    """Write the three files, on the first process of a cluster."""
    import jax

    if jax.process_index() != 0:
        return
    write_json(folder / "sweep.json", {"runs": rows})
    write_text(folder / "sweep.md", markdown(rows))
    page = [
        (
            "Validation loss",
            report.Html(STYLE),
            chart({r["name"]: r["curve"] for r in rows if r.get("curve")}),
        ),
        ("Runs", report.table([_cells(row, rows) for row in rows], "What differs, and what came of it")),
        ("Run it", report.commands(f"jaxgpt sweep {words}")),
    ]
    report.write(folder / "sweep.html", f"Sweep {folder.name}", page)


WORDS = ("Run", "Differs in", "State")
"""The columns of words; the others are numbers."""
MEASURED = ("Best validation loss", "Best validation accuracy", "Bits per byte")
"""Those of them that the terminal shows too."""


def _cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A row of the tables: what a person reads of a run. The first shows what the others change."""
    differs = row["differs"]
    if row is rows[0]:
        varied = dict.fromkeys(name for other in rows for name in other["differs"])
        differs = {name: value for name in varied if (value := _field(row.get("run"), name)) is not None}
    words = ", ".join(f"{name} {_value(value)}" for name, value in differs.items())
    labels = any("val_accuracy" in other for other in rows)

    def number(name: str, form: str = ",") -> str:
        return format(row[name], form) if name in row else "–"

    return {
        "Run": row["name"],
        "Differs in": words or "nothing",
        "Parameters": number("parameters"),
        "Steps": number("steps"),
        "Tokens": number("tokens"),
        "Best validation loss": number("val_loss", ".4f"),
        **({"Best validation accuracy": number("val_accuracy", ".4f")} if labels else {}),
        "Bits per byte": number("val_bits_per_byte", ".4f"),
        "Seconds": number("seconds", ",.1f"),
        "Tokens/s": number("tokens_per_second"),
        "State": f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
    }


def _field(config: Any, name: str) -> Any:
    """The value of a dotted name in a config as JSON; None where it has none, or a part of another kind."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _value(value: Any) -> str:
    """A field's value on one line; a part of another kind by its kind and fields."""
    if isinstance(value, dict):
        fields = ", ".join(f"{k}={_value(v)}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}({fields})"
    return str(tuple(value)) if isinstance(value, list) else str(value)


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    shown = [_cells(row, rows) for row in rows]
    bar = "\\|"  # escaped, it does not end a cell

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(' '.join(c.replace('|', bar).split()) for c in cells)} |\n"

    rule = line("---" if name in WORDS else "---:" for name in shown[0])
    return line(shown[0]) + rule + "".join(line(row.values()) for row in shown)


# Okabe & Ito's colours, darkened on white so that each keeps a contrast of 3 to the page.
STYLE = """<style>:root{--r0:#0072b2;--r1:#d55e00;--r2:#00805c;--r3:#b8478a;--r4:#a06a00;--r5:#4b5563}
@media (prefers-color-scheme:dark){:root{--r0:#56b4e9;--r1:#ff8c42;--r2:#2fc79a;--r3:#e79cc6;--r4:#f0c040;
--r5:#cbd5e1}}svg.runs text{font-size:11px}svg.runs .name{fill:var(--ink)}main{max-width:1180px}table{
font-size:.84rem}td,th{overflow-wrap:normal}td:nth-child(2){min-width:13em}td:nth-child(n+3):not(:last-child),th:nth-child(n+3):not(:last-child){
text-align:right;font-variant-numeric:tabular-nums}td:last-child{min-width:11em}</style>"""
COLOURS, DASHES = 6, ("none", "7 5", "2 5", "12 4 2 4")


def chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> report.Html:
    """Validation losses over tokens, one line a run with its name and last loss at its end.

    Lines are told apart by colour, then by dashes, and without either by their names. What lies above
    all that is measured in the last three quarters is cut off: there the runs are closest.
    """
    if not curves:
        return report.text("No run was evaluated yet.")
    most = max(x for line in curves.values() for x, _ in line)
    late = [y for line in curves.values() for x, y in line if x >= most / 4 or x == line[-1][0]]
    height = max(300.0, 17.0 * len(curves) + 40)
    x, x_ticks, _ = report.axis([most], 46, 640, zero=True)
    y, y_ticks, curved = report.axis(late, height - 28, 12)
    parts = [f"<title>Validation loss</title><desc>{len(curves)} runs</desc>"]
    parts.append(f'<clipPath id="in"><path d="M46 4H642V{height - 28:.0f}H46z"/></clipPath>')
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M46 {y(tick):.1f}H640"/>')
        parts.append(f'<text class="left" x="40" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="mid" x="{x(tick):.1f}" y="{height - 10:.0f}">{_tokens(tick)}</text>')
    parts.append('<text class="left" x="40" y="8">log</text>' if curved else "")
    order = {name: i for i, name in enumerate(curves)}
    tops = _spread([(y(line[-1][1]), name) for name, line in curves.items()], 17, height - 28)
    for name, line in curves.items():
        end, top = line[-1], tops[name]
        pen = f'style="color:var(--r{order[name] % COLOURS})" stroke-dasharray="'
        pen += f'{DASHES[order[name] // COLOURS % len(DASHES)]}"'
        tip = f"<title>{escape(name)}: {end[1]:.4f}</title>"
        points = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in report.downsample(line))
        parts.append(f'<path {pen} clip-path="url(#in)" d="M{points}h0">{tip}</path>')
        parts.append(f'<path class="grid" d="M{x(end[0]) + 3:.1f} {y(end[1]):.1f}L660 {top:.1f}"/>')
        parts.append(f'<path {pen} d="M664 {top:.1f}h30"/>')
        parts.append(f'<text class="name" x="700" y="{top + 4:.1f}">{escape(name)} {end[1]:.4f}</text>')
    words = "nats a target, over the tokens trained on; at each line's end its last"
    picture = f'<svg class="runs" viewBox="0 0 900 {height:.0f}" role="img">{"".join(parts)}</svg>'
    head = f"<figcaption>Validation loss <small>{words}</small></figcaption>"
    return report.Html(f'<figure class="card">{head}{picture}</figure>')


def _spread(tops: list[tuple[float, str]], gap: float, floor: float) -> dict[str, float]:
    """Heights of labels near the wanted ones, at least `gap` apart and not below the floor."""
    placed: list[tuple[float, str]] = []
    at = -math.inf
    for top, name in sorted(tops):
        at = max(top, at + gap, 10)
        placed.append((at, name))
    found, limit = {}, floor
    for top, name in reversed(placed):
        found[name] = limit = min(top, limit)
        limit -= gap
    return found


def _tokens(count: float) -> str:
    """A number of tokens, short."""
    units = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    unit = next((u for u in "TBMk" if count >= units[u]), "")
    return f"{count / units[unit]:g}{unit}"
