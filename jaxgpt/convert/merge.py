"""`jaxgpt merge RUN FOLDER`: a tuned run and its base as one model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from jaxgpt.config import ONE_DEVICE, Full, Mesh, code, load_run
from jaxgpt.convert.commands import RunFolder, refuse_filled, save_params, whole
from jaxgpt.errors import require
from jaxgpt.files import write_json
from jaxgpt.sample.settings import Verify


def merge(
    run: RunFolder,
    folder: RunFolder,
    *,
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write a tuned run and its base as one run, which needs neither: to sample, evaluate, export or tune on.

    Args:
      run: folder of a run of LoRA, DoRA, IA3, BitFit or LastLayers.
      folder: folder to create.
      checkpoint: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that trains all parameters, or a method that leaves something beside the weights.
    """
    import jax

    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.hooks import MADE_FROM

    source, target = Path(run), Path(folder)
    held, name = load_run(source), type(load_run(source).tune).__name__
    require(
        not isinstance(held.tune, Full),
        f"{source} trains all parameters: it is whole already, so copy it; merge takes a run whose `tune` is "
        "LoRA, DoRA, IA3, BitFit or LastLayers.",
    )
    refuse_filled(target, "a run")
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        "added" not in trained.params,
        f"{source} is tuned by {name}, which adds something beside the weights that cannot be merged into "
        f"them; use {source} as it is (with --self-contained it holds its base).",
    )
    made = dataclasses.replace(
        held, name=target.resolve().name, runs=str(target.resolve().parent), tune=Full()
    )
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(trained.params))) as work:
        shutil.copytree(source / "tokenizer", work / "tokenizer")
        if (source / code.FOLDER).is_dir():
            shutil.copytree(source / code.FOLDER, work / code.FOLDER)
        write_json(work / MADE_FROM, {"run": str(source), "step": trained.step, "tune": name})
        save_params(work, made, trained.params, trained.step)
    print(f"{target}: {source}, step {trained.step}, merged with its base; try `jaxgpt sample {target}`")
