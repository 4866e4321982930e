"""`jaxgpt quantize RUN OUT`: a run whose matrices are held in few bits."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxgpt.config import ONE_DEVICE, Mesh, Quantization, Run, code, load_run
from jaxgpt.config.bounds import Rows, TokensOr0, bounded
from jaxgpt.config.tune import Form
from jaxgpt.convert.commands import RunFolder, refuse_filled, save_params, whole
from jaxgpt.errors import require
from jaxgpt.files import write_json
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    import numpy as np

    from jaxgpt.sample.load import Trained

log = logging.getLogger(__name__)

OutFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
RECORD = "quantize.json"
"""In the new run's folder: what was measured."""
HELD_OUT = 10
"""Without a text of its own to measure on, one in so many tokens of the text is kept for it, at its end."""


@bounded
def quantize(
    run: RunFolder,
    out: OutFolder,
    *,
    to: Form = "int8",
    method: Literal["rtn", "gptq", "awq", "smoothquant"] = "rtn",
    activations: Literal["auto", "float", "int8"] = "auto",
    text: tuple[str, ...] = (),
    heldout: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    rows: Rows = 128,
    length: TokensOr0 = 512,
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write a run whose matrices are held in few bits, and say what it costs in perplexity.

    Embeddings, norms, biases and routers stay in float32. The new run is used like any other.

    Args:
      run: folder of the run.
      out: folder to create.
      to: 8 bits with a scale for each output (int8, fp8), or 4 with a scale for each 64 inputs (int4, nf4).
      method: round each weight to the nearest value (rtn), or by what layers read on a text: gptq, awq, or
        smoothquant, which is for inputs in int8.
      activations: int8 rounds the inputs of products too; auto does so for smoothquant alone.
      text: files to calibrate on: text, .jsonl or .parquet. Their last tenth is held out.
      heldout: files to measure perplexity on in place of that tenth.
      skip: linear layers to leave as they are, as patterns over their names, such as 'blocks.mlp.down'.
      rows: maximum number of rows of the text to calibrate on.
      length: tokens of such a row; 0 means the model's context.
      checkpoint: `best` on validation data, `newest`, or a step number.
      verify: compare the checksums of what is loaded.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run in few bits already, a method without a text, or one that does not fit the model.
    """
    import jax

    from jaxgpt.convert import few_bits
    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.hooks import MADE_FROM

    source, target, few = Path(run), Path(out), "int8" if method == "smoothquant" else "float"
    tune = Quantization(
        to=to, method=method, skip=skip, activations=few if activations == "auto" else activations
    )
    held = load_run(source)
    require(
        not isinstance(held.tune, Quantization),
        f"{source} is in few bits already ({getattr(held.tune, 'to', '')}); quantize the run it was made of.",
    )
    require(
        method == "rtn" or bool(text),
        f"--method is {method!r}, which looks at what layers read; name a text with --text.",
    )
    refuse_filled(target, "a run")
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        "added" not in trained.params,
        f"{source} has something beside its weights; quantize the run that it was tuned from.",
    )
    trained = trained._replace(params=few_bits.latent(trained, verify=verify))
    seen, unseen = read_split(trained, text, heldout)
    context = min(length or trained.run.model.context, trained.run.model.context)
    params = few_bits.quantized(trained, tune, seen, context, rows)
    made = dataclasses.replace(held, name=target.resolve().name, runs=str(target.resolve().parent), tune=tune)
    record = few_bits.compared(trained, trained._replace(run=made, params=params), unseen)
    record = {"run": str(source), "step": trained.step, "to": to, "method": method} | record
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(params))) as work:
        shutil.copytree(source / "tokenizer", work / "tokenizer")
        for name in (code.FOLDER, "hf"):
            if (source / name).is_dir():
                shutil.copytree(source / name, work / name)
        write_json(work / MADE_FROM, {"run": str(source), "step": trained.step, "quantize": to})
        write_json(work / RECORD, record)
        save_params(work, made, few_bits.saved(made, params), trained.step)
    print(_said(target, made, record))


def read_split(
    trained: Trained, text: tuple[str, ...], heldout: tuple[str, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of documents to calibrate on, and of those to measure on."""
    from jaxgpt.evals.perplexity import read_texts

    def read(files: tuple[str, ...]) -> list[np.ndarray]:
        return [document.ids_N for document in read_texts(files, trained.tokenizer, trained.bos)]

    seen = read(text)
    if heldout:
        return seen, read(heldout)
    total, done, kept, apart = sum(map(len, seen)), 0, [], []
    for ids in seen:
        cut = min(len(ids), max(0, total - total // HELD_OUT - done))
        kept += [ids[:cut]] if cut else []
        apart += [ids[max(0, cut - 1) :]] if cut < len(ids) else []
        done += len(ids)
    return kept, apart


def _said(target: Path, run: Run, record: dict[str, Any]) -> str:
    """The result in a few lines."""
    size, found = record["bytes"], record["perplexity"]
    lines = [
        f"{target}: {record['matrices']} matrices in {record['to']} by {record['method']}",
        f"parameters: {size['before'] / 1e6:.2f} MB -> {size['after'] / 1e6:.2f} MB",
    ]
    if found is None:
        lines.append("perplexity: not measured; name a text with --text or --heldout")
    else:
        change = found["after"] / found["before"] - 1
        lines.append(
            f"perplexity: {found['before']:.4f} -> {found['after']:.4f} ({change:+.2%}) on "
            f"{record['on']}, {record['tokens']:,} tokens"
        )
    verb = "eval" if not run.writes else "chat" if run.templated else "sample"
    return "\n".join([*lines, f"try `jaxgpt {verb} {target}`"])
