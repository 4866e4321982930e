"""`jaxgpt sweep CONFIG`: the runs of a config file's `sweep()` one after another, and how they compare."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jaxgpt.config import Run, load_sweep, override, to_json
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import Count, check_json, read_json, require_writable, write_json, write_text
from jaxgpt.lock import owned
from jaxgpt.report.measure import by_seed, differences, measure
from jaxgpt.report.sweep import Row, markdown, print_rows, write_sweep

log = logging.getLogger(__name__)
PROG = "jaxgpt sweep CONFIG [--only NAME ...] [--seeds N]"
HELP = """Train the runs that a config file's `def sweep()` yields as (name, Run), one after another, each in
RUNS/FILE/NAME. After each, RUNS/FILE has the comparison as sweep.html, sweep.md and sweep.json. The
same command again goes on where it stopped. --only trains the runs named; --seeds N trains each run N
times, as NAME-s0, NAME-s1 and so on with train.seed counted up, and compares means with their spread;
other flags, which are those of `jaxgpt train`, set a field in every run.
"""
DONE = ("finished", "patience")


class Held(TypedDict):
    """A row of sweep.json: see `report.sweep.Row`."""

    name: str
    run: dict[str, Any]
    differs: dict[str, Any]
    state: str
    reason: str
    parameters: NotRequired[Count]
    steps: NotRequired[Count]
    tokens: NotRequired[Count]
    val_loss: NotRequired[float]
    val_accuracy: NotRequired[float]
    val_bits_per_byte: NotRequired[float]
    val_reward: NotRequired[float]
    seconds: NotRequired[float]
    tokens_per_second: NotRequired[Count]
    curve: NotRequired[list[tuple[float, float]]]


class Table(TypedDict):
    """What sweep.json holds."""

    runs: list[Held]


def sweep(args: list[str]) -> int:
    """Train every run of a config's `sweep()`, from where each stands; compare them in one folder.

    Exit codes: 0 done, 2 user error, 3 a run failed, 75 stopped with everything saved.
    """
    (args, only), seeds = split_only(args), 1
    if "--seeds" in args:
        at = args.index("--seeds")
        count = args[at + 1 : at + 2]
        require(
            bool(count) and count[0].isdecimal() and 1 <= int(count[0]) <= 1000,
            f"--seeds is {' '.join(count) or 'without a number'}; give the number of seeds, 1 to 1000.",
        )
        args, seeds = args[:at] + args[at + 2 :], int(count[0])
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            override(Run(name="NAME"), ["--help"], PROG, HELP)
        raise UserError("`jaxgpt sweep` needs a CONFIG first: a .py file with `def sweep()`.")
    runs = over_seeds(sweep_runs(args[0], args[1:]), seeds)
    for name in only:
        require_known(name, runs, f"--only {name!r} is no run of {args[0]}")
    words = shlex.join(args) + f" --seeds {seeds}" * (seeds > 1)
    return run_sweep(runs, [name for name in runs if not only or name in only], words)


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


def over_seeds(runs: Mapping[str, Run], seeds: int) -> dict[str, Run]:
    """Each run with that many seeds, from its own on; one run where there is one seed."""
    if seeds == 1:
        return dict(runs)
    made = {}
    for name, run in runs.items():
        for i in range(seeds):
            train = dataclasses.replace(run.train, seed=run.train.seed + i)
            made[f"{name}-s{train.seed}"] = dataclasses.replace(
                run, name=f"{name}-s{train.seed}", train=train
            )
    return made


def run_sweep(runs: Mapping[str, Run], chosen: Sequence[str], words: str) -> int:
    """Train the chosen runs; after each, bring `sweep.json`, `sweep.md` and `sweep.html` up to date.

    Args:
      runs: all runs of the sweep.
      chosen: names of those to train.
      words: the command's arguments, for the page.

    Returns:
      The exit code; see `sweep`.
    """
    import jax

    from jaxgpt.train.hooks import check_folder
    from jaxgpt.train.signals import STOPPED_BY_SIGNAL

    for name in chosen:  # before anything is written: the table of what is there may be all that is wanted
        check_folder(runs[name])
    folder = Path(next(iter(runs.values())).runs)
    require_writable(folder)
    with owned(folder) if jax.process_index() == 0 else nullcontext():
        rows = _held_rows(runs, folder)
        stopped = _train_all(runs, chosen, rows, folder, words)
    states = [rows[name]["state"] for name in chosen]
    done, failed = sum(state in DONE for state in states), states.count("failed")
    then = f"{stopped}; run the same command to go on" if stopped else f"see {folder / 'sweep.html'}"
    counts = f"{done} of {len(chosen)} runs done" + f", {failed} failed" * bool(failed)
    print_rows(by_seed(list(rows.values())))
    print(f"{folder}: {counts}{_best_words([rows[name] for name in chosen])}; {then}")
    return STOPPED_BY_SIGNAL if stopped else 3 if failed else 0


def _train_all(
    runs: Mapping[str, Run], chosen: Sequence[str], rows: dict[str, Row], folder: Path, words: str
) -> str:
    """Train the chosen runs and note in `rows` what came of each; says why if it was stopped."""
    stopped = ""
    # Within a run a signal saves first (`StopSignal`); between two, nothing is left to be saved.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, name in enumerate(chosen, 1):
            if _skips(rows[name], runs[name]):
                log.info("%s is done", runs[name].folder)
            else:
                log.info("run %d of %d: %s", number, len(chosen), runs[name].folder)
                kept = {key: rows[name][key] for key in ("name", "run", "differs")}
                rows[name] = kept | _train(runs[name], Path(shlex.split(words)[0]))
                log.info("%s: %s%s", name, rows[name]["state"], _best_words([rows[name]]))
            _write(folder, list(rows.values()), words)
            if rows[name]["state"] == "stopped":
                stopped = rows[name]["reason"]
                break
    except KeyboardInterrupt:
        stopped = "stopped before a run had begun"
    except OSError:  # the table cannot be written: what was measured is shown
        print_rows(by_seed(list(rows.values())))
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return stopped


def _train(run: Run, source: Path) -> Row:
    """Train one run; how it ended and what it measured."""
    import jax

    from jaxgpt.checkpoint import SaveError
    from jaxgpt.evals.during import task_scores
    from jaxgpt.models import parameter_counts
    from jaxgpt.train import loop

    row: Row = {"parameters": parameter_counts(run.model)["total"]}
    try:
        result = loop.train(run, source=source, scores=task_scores)
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


def _held_rows(runs: Mapping[str, Run], folder: Path) -> dict[str, Row]:
    """A row a run: as an earlier call left it if that was of the same config, else waiting."""
    held, path, fix = dict[str, Row](), folder / "sweep.json", "its rows are made again"
    if path.exists():
        try:
            found = read_json(path, dict[str, Any], fix)
            check_json(found, Table, path, fix)
            held = {row["name"]: row for row in found["runs"]}
        except UserError as error:
            log.warning("%s", error)
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
    for name in ("accuracy", "reward"):
        if found := [r for r in rows if f"val_{name}" in r]:
            best = max(found, key=lambda r: r[f"val_{name}"])
            return f", highest validation {name} {best[f'val_{name}']:.4f} ({best['name']})"
    best = min((r for r in rows if "val_loss" in r), key=lambda r: r["val_loss"], default=None)
    return f", lowest validation loss {best['val_loss']:.4f} ({best['name']})" if best else ""


def _write(folder: Path, rows: list[Row], words: str) -> None:
    """Write the three files, on the first process of a cluster."""
    import jax

    if jax.process_index() != 0:
        return
    write_json(folder / "sweep.json", {"runs": rows})
    write_text(folder / "sweep.md", markdown(by_seed(rows)))
    write_sweep(folder / "sweep.html", f"Sweep {folder.name}", rows, f"jaxgpt sweep {words}")
