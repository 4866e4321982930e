"""`jaxgpt compare RUN RUN ...`: settings that differ, final numbers, and curves of runs in one plot."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxgpt.config import Run, code, load, to_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import read_json, write_json, write_text
from jaxgpt.report.measure import Row, by_seed, differences, measure
from jaxgpt.report.run import Evaluation
from jaxgpt.report.sweep import markdown, print_rows, write_sweep

log = logging.getLogger(__name__)

NOT_TOLD = ("name", "runs")
"""Fields in which runs always differ."""


def compare(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    out: str = "",
) -> None:
    """Compare trained runs: the settings that differ, final numbers and curves.

    Runs that differ in train.seed alone are one line, a mean with its spread. A folder of runs (as a sweep's)
    stands for all runs in it; runs may still be training. The table is printed; compare.html has the curves.

    Args:
      runs: folders of runs, or of folders of runs.
      out: folder for compare.html, compare.md and compare.json; empty means the one that holds the first run.

    Raises:
      UserError: a folder that is none of a run.
    """
    folders = [folder for run in runs for folder in _runs_in(Path(run))]
    require(bool(folders), "no run is named; give the folders of two runs or more.")
    rows = compare_runs(folders)
    place = Path(out) if out else folders[0].resolve().parent
    write_json(place / "compare.json", {"runs": rows})
    write_text(place / "compare.md", markdown(by_seed(rows)))
    page = write_sweep(
        place / "compare.html", "Runs compared", rows, f"jaxgpt compare {shlex.join(map(str, runs))}"
    )
    print_rows(by_seed(rows))
    print(f"{len(rows)} runs compared; see {page}")


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file():
        return [folder]
    require(folder.is_dir(), f"run folder {str(folder)!r} does not exist; give the folder of a run.")
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    require(bool(found), f"{str(folder)!r} is no run folder, and none is in it; give the folder of a run.")
    return found


def compare_runs(folders: Sequence[Path]) -> list[Row]:
    """A row for each run's folder, in their order; `differs` is what is not as in the first run.

    Raises:
      UserError: a folder that is none of a run.
    """
    runs = [load(folder) for folder in folders]
    names = _names(folders)
    configs = [code.portable(to_json(run)) for run in runs]
    return [
        {
            "name": name,
            "run": config,
            "differs": {k: v for k, v in differences(configs[0], config).items() if k not in NOT_TOLD},
            **_measured(folder, run),
        }
        for name, folder, run, config in zip(names, folders, runs, configs, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return [str(f) if names.count(name) > 1 else name for name, f in zip(names, folders, strict=True)]


def _measured(folder: Path, run: Run) -> dict[str, Any]:
    from jaxgpt.models import parameter_counts

    found = measure(run, folder)
    done = found.get("steps", 0)
    state = "finished" if done >= run.train.steps else f"step {done:,} of {run.train.steps:,}"
    found |= {"parameters": parameter_counts(run.model)["total"], "state": state, "reason": ""}
    if figures := _figures(folder):
        found["figures"] = figures
    return found


def _figures(folder: Path) -> dict[str, float]:
    """What `jaxgpt eval` left of a run: figures by the name of their file and their own."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("eval/*.json")):
        try:
            held = read_json(path, Evaluation, "the comparison leaves it out")
        except UserError as error:
            log.warning("%s", error)
            continue
        for figure in held["figures"].values():
            if figure["value"] is not None:
                found[f"{path.stem}: {figure['name']}"] = figure["value"]
    return found
