"""`jaxgpt prune RUN OUT`: a smaller run, of what matters most of another on a text."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.config import GPT, ONE_DEVICE, Full, Mesh, Run, Sampling, code, load_run
from jaxgpt.config.bounds import Bounds, Rows, TokensOr0, bounded
from jaxgpt.convert.commands import RunFolder, save_params
from jaxgpt.convert.folders import refuse_filled, whole
from jaxgpt.errors import require
from jaxgpt.files import write_json
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    import numpy as np

    from jaxgpt.sample.load import Trained

log = logging.getLogger(__name__)

OutFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Kept = Annotated[int, Bounds(0, 2**20)]
RECORD = "prune.json"
"""In the new run's folder: what was kept, and what was measured."""
_SPEED_TOKENS = 64


@bounded
def prune(
    run: RunFolder,
    out: OutFolder,
    *,
    text: tuple[str, ...],
    layers: Kept = 0,
    heads: Kept = 0,
    width: Kept = 0,
    heldout: tuple[str, ...] = (),
    rows: Rows = 128,
    length: TokensOr0 = 512,
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write a smaller run with the layers, heads or hidden units that matter most on a text.

    The new run is used like any other; it loses much at first, and training it again, such as by distillation
    from the old one (configs/distill.py), brings most of it back.

    Args:
      run: folder of the run.
      out: folder to create.
      text: files to measure importance on: text, .jsonl or .parquet. Their last tenth is held out.
      layers: layers to keep, of those that change the stream most; unspecified keeps all.
      heads: attention heads to keep in each layer, in whole groups that share keys and values.
      width: hidden units of the MLP to keep in each layer.
      heldout: files to measure the loss on in place of that tenth.
      rows: maximum number of rows of the text to measure importance on.
      length: tokens of such a row; 0 means the model's context.
      checkpoint: `best` on validation data, `newest`, or a step number.
      verify: compare the checksums of what is loaded.
      mesh: devices to spread the model over.

    Raises:
      UserError: a model that cannot be cut so, or more to keep than there is.
    """
    import jax

    from jaxgpt.convert import calibrate
    from jaxgpt.convert.quantize import read_split
    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.hooks import MADE_FROM
    from jaxgpt.tune.few_bits import whole_params

    source, target = Path(run), Path(out)
    held = load_run(source)
    _check(held, layers, heads, width)
    refuse_filled(target, "a run")
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        "added" not in trained.params,
        f"{source} has something beside its weights; prune the run that it was tuned from.",
    )
    trained = trained._replace(params=whole_params(trained.params))
    seen, unseen = read_split(trained, text, heldout)
    rows_RT = calibrate.rows_of(seen, min(length or held.model.context, held.model.context), rows)
    require(
        rows_RT.size > 1, f"the text has {rows_RT.size} tokens to measure importance on; name a longer one."
    )
    smaller, kept = _cut(trained, rows_RT, layers, heads, width)
    name = target.resolve().name
    made = dataclasses.replace(smaller.run, name=name, runs=str(target.resolve().parent), tune=Full())
    smaller = smaller._replace(run=made)
    record = {"run": str(source), "step": trained.step, "kept": kept} | _compared(trained, smaller, unseen)
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(smaller.params))) as work:
        shutil.copytree(source / "tokenizer", work / "tokenizer")
        if (source / code.FOLDER).is_dir():
            shutil.copytree(source / code.FOLDER, work / code.FOLDER)
        write_json(work / MADE_FROM, {"run": str(source), "step": trained.step, "prune": kept})
        write_json(work / RECORD, record)
        save_params(work, made, smaller.params, trained.step)
    _show(target, record)


def _check(run: Run, layers: int, heads: int, width: int) -> None:
    """Refuse what cannot be cut, or into which there is nothing to cut."""
    model: Any = run.model
    require(
        isinstance(model, GPT) and model.causal,
        f"the model is {type(model).__name__}; causal GPTs alone are pruned.",
    )
    require(bool(layers or heads or width), "nothing is asked for; say --layers, --heads or --width.")
    has = {"layers": (layers, model.layers), "heads": (heads, model.heads), "width": (width, model.hidden)}
    for name, (asked, there) in has.items():
        require(asked <= there, f"--{name} is {asked} but the model has {there}; ask for fewer.")
    per = model.heads // model.groups
    require(
        heads == per * (heads // per),
        f"--heads is {heads} but {per} query heads share each key-value head; give a multiple of {per}.",
    )
    require(
        not heads or model.position not in ("alibi", "relative"),
        f"--heads is {heads} but positions are {model.position}, which belong to heads; use --layers or "
        "--width.",
    )
    require(
        not width or not model.moe, f"--width is {width} but the MLPs are experts; use --layers or --heads."
    )


def _cut(
    trained: Trained, rows_RT: np.ndarray, layers: int, heads: int, width: int
) -> tuple[Trained, dict[str, Any]]:
    """The smaller model, and what was kept of each kind; all is measured on the whole model."""
    from jaxgpt.convert import importance

    model: Any = trained.run.model
    params, kept, scores = trained.params, {}, {}
    per = model.heads // model.groups
    if heads:
        scores["heads"] = importance.most(importance.of_heads(trained, rows_RT), heads // per)
    if width:
        scores["width"] = importance.most(importance.of_units(trained, rows_RT), width)
    for name, cut in (("heads", importance.without_heads), ("width", importance.without_units)):
        if name in scores:
            model, params = cut(model, params, scores[name])
            kept[name] = scores[name].tolist() if name == "heads" else width
    if layers:
        influence_L = importance.of_layers(trained, rows_RT)
        chosen = importance.most(influence_L, layers)
        model, params = importance.without_layers(model, params, chosen)
        kept |= {"layers": chosen.tolist(), "influence": [round(float(x), 6) for x in influence_L]}
    run = dataclasses.replace(trained.run, model=model)
    return trained._replace(run=run, params=params), kept


def _compared(before: Trained, after: Trained, texts: list[np.ndarray]) -> dict[str, Any]:
    """Sizes, speeds and losses of both."""
    from jaxgpt.convert.few_bits import losses
    from jaxgpt.models import parameter_counts

    on, found = losses([before, after], texts)
    nats = [None, None] if found is None else [one["loss"] for one in found]
    rows = [
        {
            "parameters": parameter_counts(one.run.model)["total"],
            "tokens_per_second": round(_speed(one), 1),
            "loss": loss,
        }
        for one, loss in zip((before, after), nats, strict=True)
    ]
    return {"on": on, "before": rows[0], "after": rows[1]}


def _speed(trained: Trained) -> float:
    """Tokens a second of greedy decoding, one row."""
    from jaxgpt.sample.generate import Generator

    run = trained.run
    generator = Generator(run.model, run.compute, trained.params, trained.tokenizer, mesh=trained.mesh)
    prompt = [trained.tokenizer.control["<|bos|>"]]
    count, seconds = min(_SPEED_TOKENS, generator.context - len(prompt)), []
    for _ in range(4):  # the first compiles
        begun = time.perf_counter()
        generator.generate([prompt], Sampling(temperature=0.0), max_new_tokens=count, stop=())
        seconds.append(time.perf_counter() - begun)
    return count / min(seconds[1:])


def _show(target: Path, record: dict[str, Any]) -> None:
    """The table of both."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "parameters", "tokens/s", f"loss on {record['on'] or 'nothing'}", title=str(target))
    for name in ("before", "after"):
        row = record[name]
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(name, f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}", loss)
    Console().print(table)
