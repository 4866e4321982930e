"""The parameters of a whole model, also of a run that holds a part of them by reference to its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypedDict

import jax

from jaxgpt.checkpoint.checksum import digest, measure
from jaxgpt.checkpoint.store import load_saved
from jaxgpt.config import Compute, Full, Run, load_run
from jaxgpt.errors import UserError, require
from jaxgpt.files import Count, read_json, write_json
from jaxgpt.models import abstract_params
from jaxgpt.sharding import param_shardings, replicated
from jaxgpt.target import Target
from jaxgpt.tune import make_tuning
from jaxgpt.tune.few_bits import whole_params

FILE, COPY = "base.json", "base"
"""In the folder of a tuned run: what names its base, and a copy of that where one was asked for."""


class Base(TypedDict):
    """What a tuned run was tuned from.

    Attributes:
      run: the folder of that run, as its config names it.
      step: of its checkpoint.
      digest: of the parameters.
    """

    run: str
    step: Count
    digest: str


def params_digest(params: dict) -> str:
    """A checksum of parameters, the same on every mesh."""
    return f"{digest(measure(params)):08x}"


def note_base(folder: Path, base: Base, *, copy: bool) -> None:
    """Leave in a run's folder what it is tuned from.

    Args:
      folder: of the run.
      base: what to note.
      copy: also copy what is needed of the base's folder, so that this one can do without it.
    """
    target = folder / COPY
    if copy and not target.exists():
        source, making = Path(base["run"]), folder / f"{COPY}.part"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        step = Path("checkpoints") / str(base["step"])
        for name in ("config.json", FILE, "tokenizer", "code", "hf", COPY, step):
            part = source / name
            if part.is_dir():
                shutil.copytree(part, making / name)
            elif part.is_file():
                shutil.copy2(part, making / name)
        making.rename(target)
    write_json(folder / FILE, dict(base))


def find_base(folder: Path) -> tuple[Path, Base]:
    """The folder that a tuned run's base is in, and what the run knows of it.

    Raises:
      UserError: it is not where it was.
    """
    base = read_json(folder / FILE, Base, "bring the file back, or tune the base again")
    named = Path(base["run"])
    places = [folder / COPY, named, folder.parent / named.name]
    for place in places:
        if (place / "config.json").is_file():
            return place, base
    raise UserError(
        f"{folder} was tuned from {named}, which is not there, nor is {places[-1]}; bring that run back, or "
        "tune with --self-contained, which keeps a copy."
    )


def load_base(folder: Path, mesh: jax.sharding.Mesh, *, verify: bool = True) -> dict:
    """The parameters that a tuned run's folder refers to.

    Raises:
      UserError: they are not there, or are others now.
    """
    place, base = find_base(folder)
    params, _ = load_params(place, load_run(place), mesh, str(base["step"]), verify=verify)
    require(
        params_digest(params) == base["digest"],
        f"{place} has other parameters at step {base['step']} than when {folder} was tuned from it; "
        "bring back the run of then.",
    )
    return params


def load_params(
    folder: str | Path, run: Run, mesh: jax.sharding.Mesh, which: str = "best", *, verify: bool = True
) -> tuple[dict, int]:
    """Parameters of a run's model, in the training form, on any mesh; see `store.load_saved`.

    Those of a tuned run are put together with its base: weights are arrays, and the entry `added` is there
    where the method adds something else (`models.assemble`). Weights in few bits stay so
    (`tune.few_bits.whole_params` makes arrays of them).

    Returns:
      The parameters and their step.

    Raises:
      UserError: there is no such checkpoint, none is whole, or it does not fit the config; no base is there.
    """
    saved, step = load_saved(folder, run, mesh, which, verify=verify)
    if type(run.tune) is Full:
        return saved, step
    if isinstance(run.tune, Full):  # all that the run needs was saved, in another form than the model reads
        tuning = make_tuning(run.tune, run.model, Compute(attention="xla"), Target.of(mesh))
        with jax.set_mesh(mesh):
            return jax.jit(lambda saved: tuning.enter(saved, {}, None))(saved), step
    return _merged(run, saved, load_base(Path(folder), mesh, verify=verify), mesh), step


def _merged(run: Run, saved: dict, base: dict, mesh: jax.sharding.Mesh) -> dict:
    tuning = make_tuning(run.tune, run.model, Compute(dtype="float32", attention="xla"), Target.of(mesh))

    def merge(saved: dict, base: dict) -> dict:
        return tuning.merge(saved, tuning.freeze(whole_model(run, base)))

    layouts = param_shardings(abstract_params(run.model), mesh)
    with jax.set_mesh(mesh):
        added: Any = jax.eval_shape(merge, saved, base).get("added")
        if added is not None:
            layouts["added"] = jax.tree.map(lambda _: replicated(mesh), added)
        return jax.jit(merge, out_shardings=layouts)(saved, base)


def whole_model(run: Run, base: dict) -> dict:
    """Parameters of another run as those of this one's model: arrays, and of a backbone under its name.

    Raises:
      UserError: they hold what a tuning method has added beside the weights.
    """
    require(
        "added" not in base,
        f"init_from {run.init_from!r} is a run tuned with something beside its weights (virtual tokens or "
        "bottleneck adapters), which no other run can start from; name the run that it was tuned from.",
    )
    base = whole_params(base)
    headless = run.headed is not None and "backbone" not in base
    return {"backbone": base} if headless else base
