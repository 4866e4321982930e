"""The teacher of a run that distills: another run's model, the same one from the first step to the last."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import jax
from flax import nnx

from jaxgpt.checkpoint.whole import load_params, params_digest
from jaxgpt.config import GPT, Distillation, Run, load_run
from jaxgpt.errors import require
from jaxgpt.files import Count, read_json, write_json
from jaxgpt.models import abstract_model
from jaxgpt.target import Target
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FILE = "teacher.json"
"""In a run's folder: what it learns from."""


class About(TypedDict):
    """A teacher: its folder, the step of its checkpoint and a digest of the parameters."""

    run: str
    step: Count
    digest: str


class Teacher(NamedTuple):
    """A teacher's graph and parameters."""

    graphdef: nnx.GraphDef
    params: dict


def load_teacher(run: Run, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, *, verify: bool) -> Teacher | None:
    """The teacher of a run whose folder is owned; None where it has none.

    Raises:
      UserError: no such run, one whose distribution is not over the same tokens or that cannot see as much,
        or one that has changed since the run began.
    """
    if not isinstance(run.objective, Distillation):
        return None
    folder = run.objective.teacher
    held: Any = load_run(folder)
    require(
        isinstance(held.model, GPT) and held.model.causal and held.model.vocab_size == run.model.vocab_size,
        f"objective.teacher {folder!r} is no causal GPT of {run.model.vocab_size} ids like this run; name "
        "another, or set model.vocab_size to the teacher's.",
    )
    require(
        load_tokenizer(f"{folder}/tokenizer").digest == tokenizer.digest,
        f"objective.teacher {folder!r} has another tokenizer than this run; set data to be read by the "
        f"teacher's, {folder}/tokenizer.",
    )
    require(
        held.model.context >= run.length,
        f"objective.teacher {folder!r} sees {held.model.context} tokens but rows have {run.length}; set "
        f"data.length to {held.model.context} or less.",
    )
    path = run.folder / FILE
    noted = read_json(path, About, "bring the file back") if path.is_file() else None
    params, step = load_params(folder, held, mesh, str(noted["step"]) if noted else "best", verify=verify)
    about: About = {"run": folder, "step": step, "digest": params_digest(params)}
    require(
        noted is None or noted["digest"] == about["digest"],
        f"{folder} has other parameters at step {step} than when {run.folder} began to learn from it; bring "
        "back the run of then.",
    )
    if noted is None and jax.process_index() == 0:
        write_json(path, about)
    log.info("the teacher is %s, step %d", folder, step)
    graphdef, _ = abstract_model(held.model, replace(run.compute, remat="none"), Target.of(mesh))
    return Teacher(graphdef, params)
