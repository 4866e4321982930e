"""`jaxgpt soup RUN RUN ...`: the average of several runs' parameters, or of a run's last checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.config import ONE_DEVICE, Full, Mesh, Run, code, load_run
from jaxgpt.config.bounds import Steps, Weight, bounded
from jaxgpt.convert.commands import refuse_filled, save_params, whole
from jaxgpt.errors import require
from jaxgpt.files import write_json
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    import jax


@bounded
def soup(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    out: str,
    weights: tuple[Weight, ...] = (),
    last: Steps = 1,
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write the average of several runs' parameters as one run (a model soup: Wortsman et al. 2022).

    It helps where the runs were tuned from one base, with other seeds, data or rates; runs that began apart
    have nothing in common. Of a single run, --last N averages its newest checkpoints.

    Args:
      runs: folders of runs of one architecture and tokenizer.
      out: folder to create.
      weights: of each run, in any unit; empty means all alike.
      last: number of newest checkpoints of the one run that is named.
      checkpoint: of each run: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.

    Raises:
      UserError: runs that do not fit each other, or a folder that holds something.
    """
    import jax

    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.hooks import MADE_FROM
    from jaxgpt.tune.few_bits import whole_params

    places = _places(runs, last, checkpoint)
    parts = weights or (1.0,) * len(places)
    require(
        len(parts) == len(places) and all(w >= 0 for w in parts) and sum(parts) > 0,
        f"--weights are {weights} for {len(places)} runs or checkpoints; give each one, not below 0.",
    )
    held = [load_run(folder) for folder, _ in places]
    _require_alike([folder for folder, _ in places], held)
    target = Path(out)
    refuse_filled(target, "a run")
    total: Any = None
    step = 0
    digests, made_of = set[str](), []
    for (folder, which), weight in zip(places, parts, strict=True):
        trained = load_trained(folder, which=which, mesh=mesh, verify=verify)
        require(
            "added" not in trained.params,
            f"{folder} has something beside its weights; it cannot be averaged.",
        )
        digests.add(trained.tokenizer.digest)
        require(len(digests) == 1, f"{folder} has another tokenizer than {places[0][0]}; name runs with one.")
        made_of.append({"run": str(folder), "step": trained.step, "weight": weight / sum(parts)})
        total = _added(total, whole_params(trained.params), weight / sum(parts))
        step = trained.step
    made = dataclasses.replace(
        held[0], name=target.resolve().name, runs=str(target.resolve().parent), tune=Full()
    )
    source = Path(places[0][0])
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(total))) as work:
        shutil.copytree(source / "tokenizer", work / "tokenizer")
        if (source / code.FOLDER).is_dir():
            shutil.copytree(source / code.FOLDER, work / code.FOLDER)
        write_json(work / MADE_FROM, {"average": made_of})
        save_params(work, made, total, step)
    print(f"{target}: the average of {len(places)}; try `jaxgpt eval {target}`")


def _places(runs: tuple[str, ...], last: int, checkpoint: str) -> list[tuple[str, str]]:
    """The folder and checkpoint of each part."""
    if last == 1:
        require(
            len(runs) > 1, "one run is named; name two or more, or add --last N for its newest checkpoints."
        )
        return [(run, checkpoint) for run in runs]
    require(len(runs) == 1, f"--last is {last} but {len(runs)} runs are named; name one.")
    load_run(runs[0])
    from jaxgpt.checkpoint import Checkpoints

    checkpoints = Checkpoints(Path(runs[0]), keep=last)
    steps = sorted(checkpoints.whole_steps())[-last:]
    checkpoints.close()
    require(
        len(steps) == last,
        f"{runs[0]} has {len(steps)} whole checkpoints, not {last}; train with train.keep {last} or more.",
    )
    return [(runs[0], str(step)) for step in steps]


def _require_alike(folders: list[str], runs: list[Run]) -> None:
    for folder, run in zip(folders, runs, strict=True):
        require(
            run.model == runs[0].model,
            f"{folder} has another model than {folders[0]}; only runs of one architecture have an average.",
        )


def _added(total: Any, params: dict, weight: float) -> Any:
    """The sum so far plus a share of more parameters, in float32."""
    import jax

    def one(p: jax.Array, *before: jax.Array) -> jax.Array:
        part = weight * p.astype("float32")
        return (before[0] + part if before else part).astype(p.dtype)

    return jax.tree.map(one, params, *([] if total is None else [total]))
