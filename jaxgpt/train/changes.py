"""What of a config may differ when a run goes on, and when another one starts from it.

Both follow one rule: parameters keep their shapes and their meaning. A run that goes on must moreover have
done the same steps so far.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from jaxgpt.checkpoint import steps_on_disk
from jaxgpt.checkpoint.whole import FILE
from jaxgpt.config import Headed, Model, Run, Train, code, load_run, to_json
from jaxgpt.errors import UserError, require
from jaxgpt.models import abstract_params
from jaxgpt.optim import stable_until
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

NO_MATTER = (
    "mesh", "compute", "runs", "data.workers", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.eval_examples", "train.save_every", "train.keep", "train.best_holds", "train.patience",
    "train.max_bad_steps", "train.samples", "train.track",
)  # fmt: skip
"""Fields (or parts) that no step depends on: how it is computed, and what is done between steps."""
SAME_MEANING = (
    "dropout", "head_dropout", "frozen", "causal", "prefix", "context", "windows", "rope_theta",
    "rope_local_theta", "rope_scaling", "segment", "memory", "eval_memory", "same_length", "clamp", "pool",
    "balance",
)  # fmt: skip
"""Fields of a model that may differ where a run starts from another: parameters mean the same without them,
as far as their shapes agree."""
STABLE = {"constant", "wsd"}
"""Schedules with a phase that does not depend on how a run ends."""
DECAY = ("optim.schedule", "optim.final_lr", "optim.decay_fraction")
"""Fields by which they differ after it alone."""
BRANCHES = "branches"
"""In a run's folder: what was trained after the step from which a longer run branched off."""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config's JSON as one dict, by the fields' full names."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}{name}.").items()}


def differences(held: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Fields of two configs (or models) that differ, with both values."""
    before, after = (flat(code.portable(to_json(part))) for part in (held, now))
    names = sorted(before.keys() | after.keys())
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


# ---------------------------------------------------------------------------------------- a run goes on


def check_resumed(run: Run, held: Run) -> None:
    """Refuse to go on with a run under a config whose steps so far would have been others.

    Raises:
      UserError: naming the first such field.
    """
    changed = {n: pair for n, pair in differences(held, run).items() if not n.startswith(NO_MATTER)}
    if {run.optim.schedule, held.optim.schedule} <= STABLE:
        changed = {n: pair for n, pair in changed.items() if n not in DECAY}
    if "train.epochs" in changed and "train.steps" in changed:
        del changed["train.epochs"]
    if "train.steps" in changed:
        before, after = changed.pop("train.steps")
        kind = run.optim.schedule
        require(
            kind in STABLE,
            f"{run.folder} has train.steps {before}, not {after}, and with optim.schedule {kind!r} every "
            "step depends on their number (with wsd and constant not); "
            f"give this run another name, with --init-from {run.folder}.",
        )
    if changed:
        name, (before, after) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more fields" if len(changed) > 1 else ""
        raise UserError(
            f"{run.folder} holds a run with {name} {before!r}, not {after!r}{more}; "
            f"give this run another name or --runs (with --init-from {run.folder} it goes on from there), or "
            "delete the folder to start over."
        )


def branching_step(run: Run) -> int:
    """The step whose checkpoint is always kept, since longer runs branch off there; 0 for none."""
    return stable_until(run.optim, run.train.steps) if run.optim.schedule == "wsd" else 0


@dataclass(frozen=True)
class Changes:
    """What a run's folder does not say yet.

    Attributes:
      fields: of the config, by their full names, with the value before and the one now.
      until: the last step up to which both runs are the same; None where they are to the end.
    """

    fields: dict[str, tuple[Any, Any]]
    until: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in self.fields.items())


def changes(run: Run, held: Run) -> Changes:
    """What a run changes of the one that its folder holds.

    Raises:
      UserError: what has been done would be no part of it.
    """
    if run.train.epochs is not None and run.train == replace(held.train, steps=Train().steps):
        run = replace(run, train=held.train)  # its steps are not counted yet: data are not read here
    check_resumed(run, held)
    fields = {name: pair for name, pair in differences(held, run).items() if name != "runs"}
    return Changes(fields, _branch_point(run, held))


def _branch_point(run: Run, held: Run) -> int | None:
    """The last step up to which a run of more steps, or of another decay, is the same; its checkpoint,
    or an earlier one, is there where there is a later one.
    """
    if run.train.steps == held.train.steps and run.optim == held.optim:
        return None
    until = min(stable_until(one.optim, one.train.steps) for one in (run, held))
    steps, whole = steps_on_disk(run.folder)
    require(
        any(step <= until for step in whole) or not steps,
        f"{run.folder} keeps no checkpoint of step {until} or before, from which a run of {run.train.steps} "
        f"steps of optim.schedule {run.optim.schedule!r} would branch off (a higher train.keep keeps more); "
        f"give that run another name, and start it with --init-from {run.folder}.",
    )
    return until


def set_apart(folder: Path, later: list[int]) -> Path:
    """Move checkpoints into a run folder of their own, `branches/STEP`, with what belongs to them; returns
    that.
    """
    apart = folder / BRANCHES / str(later[-1])
    number = 1
    while apart.exists():
        number += 1
        apart = apart.with_name(f"{later[-1]}-{number}")
    (apart / "checkpoints").mkdir(parents=True)
    for name in ("tokenizer", code.FOLDER, "eval"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, apart / name)
    for name in ("config.json", "metrics.jsonl", "report.html"):
        if (folder / name).is_file():
            shutil.copy2(folder / name, apart / name)
    for step in later:
        shutil.move(folder / "checkpoints" / str(step), apart / "checkpoints" / str(step))
    return apart


# ----------------------------------------------------------------------------- a run starts from another


def check_base(run: Run, tokenizer: Tokenizer) -> None:
    """Make sure that the parameters of the run named by `init_from`, if there is one, fit this one's model.

    Raises:
      UserError: it is no run, a field of its model beside `SAME_MEANING` differs, parameters have other
        shapes, or its ids mean something else.
    """
    if not run.init_from or (run.folder / FILE).exists():  # a tuned run's own base is known by its digest
        return
    base, model, where = load_run(run.init_from).model, run.model, f"init_from {run.init_from!r}"
    if isinstance(model, Headed) and not isinstance(base, Headed):
        model = model.backbone
    kinds = [code.portable(to_json(one))["kind"] for one in (base, model)]
    fix = "leave `model` out to take that run's own, and set only what shall differ"
    require(kinds[0] == kinds[1], f"{where} holds a {kinds[0]}, not a {kinds[1]}; {fix}.")
    differ = [
        f"{name} {before!r}, not {after!r}"
        for name, (before, after) in differences(base, model).items()
        if not set(name.split(".")) & set(SAME_MEANING)
    ]
    require(not differ, f"{where} holds a model with {', '.join(differ)}; {fix}.")
    _check_shapes(base, model, where)
    require(
        load_tokenizer(Path(run.init_from) / "tokenizer").digest == tokenizer.digest,
        f"{where} was trained with another tokenizer than that of this run's data; "
        f"prepare the data with --tokenizer {run.init_from}/tokenizer, or leave data.tokenizer empty.",
    )


def _check_shapes(base: Model, model: Model, where: str) -> None:
    held, wanted = (_shapes(one) for one in (base, model))
    for name in sorted(held.keys() | wanted.keys()):
        before, after = held.get(name), wanted.get(name)
        if before == after:
            continue
        longer = "position" in name and base.context != model.context
        fix = (
            f"keep model.context {base.context}: its positions are a learned table, which has no more rows"
            if longer
            else "keep that run's sizes"
        )
        raise UserError(f"{where} holds {name} with shape {before}, not {after}; {fix}.")


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    flat_state = nnx.to_flat_state(abstract_params(model))
    return {".".join(map(str, path)): tuple(variable.shape) for path, variable in flat_state}
