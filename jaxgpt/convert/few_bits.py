"""What `jaxgpt quantize` does to a loaded run's parameters, and what it measures of them.

Shapes: N tokens of a text, L layers, I inputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.checkpoint.store import load_saved
from jaxgpt.config import GPT, Quantization, QuantizationAware, Run
from jaxgpt.convert import calibrate, rounding
from jaxgpt.errors import UserError, require
from jaxgpt.evals.loss import loss_of
from jaxgpt.evals.perplexity import Document, sliding
from jaxgpt.evals.scoring import Scorer
from jaxgpt.layers.quantized import Quantized, quantize
from jaxgpt.models import abstract_params
from jaxgpt.models.gpt import norm_readers
from jaxgpt.sample.load import Trained
from jaxgpt.target import Target
from jaxgpt.tune import few_bits
from jaxgpt.tune.base import About, Path, flatten, module, unflatten
from jaxgpt.tune.ia3 import Scaled

log = logging.getLogger(__name__)

ROOM = 2**30
"""Bytes of sums over inputs that are held at a time: a pass over the text watches so many layers."""


def latent(trained: Trained, *, verify: bool = True) -> dict:
    """The parameters that are rounded: of a run that trained through the rounding, those before it."""
    if not isinstance(trained.run.tune, QuantizationAware):
        return trained.params
    where = (trained.folder, trained.run, trained.mesh, str(trained.step))
    return load_saved(*where, verify=verify)[0]


def about(run: Run) -> About:
    """What methods are told of a run's model."""
    return About(run.model, run.compute, Target("cpu", "cpu"), abstract_params(run.model))


def saved(run: Run, params: dict) -> dict:
    """What is written of parameters in few bits."""
    tune: Any = run.tune
    return few_bits.held(params, tune, few_bits.matrices(about(run), tune.skip))


def quantized(
    trained: Trained, tune: Quantization, texts: Sequence[np.ndarray], length: int, rows: int
) -> dict:
    """A run's parameters with its matrices in few bits.

    Args:
      trained: the run; its parameters are arrays.
      tune: how they shall be held.
      texts: token ids [N] of documents to calibrate on, where the method does.
      length, rows: tokens of a row of them, and how many rows at most.

    Raises:
      UserError: a method that does not fit the model, or a text of fewer than two tokens.
    """
    facts = about(trained.run)
    places = few_bits.matrices(facts, tune.skip)
    if tune.method == "rtn":
        params = few_bits.rounded(trained.params, tune.to, places)
    else:
        rows_RT = calibrate.rows_of(texts, length, rows)
        require(rows_RT.size > 1, f"the text has {rows_RT.size} tokens to calibrate on; name a longer one.")
        log.info("calibrating on %d rows of %d tokens", *rows_RT.shape)
        if tune.method == "smoothquant":
            params = few_bits.rounded(_smoothed(trained, facts, rows_RT), tune.to, places)
        else:
            params = _by_layer(trained, tune, places, rows_RT)
    return unflatten({path: _active(leaf, tune) for path, leaf in flatten(params).items()})


def _active(leaf: Any, tune: Quantization) -> Any:
    """A weight whose inputs are rounded as the config says."""
    if isinstance(leaf, Scaled):
        return Scaled(_active(leaf.base, tune), into=leaf.into)
    return Quantized(leaf.array, tune.activations) if isinstance(leaf, Quantized) else leaf


def _smoothed(trained: Trained, facts: About, rows_RT: np.ndarray) -> dict:
    """Parameters after SmoothQuant's step, which changes nothing in float."""
    model = trained.run.model
    backbone: Any = getattr(model, "backbone", model)
    names = norm_readers(backbone) if isinstance(backbone, GPT) else {}
    require(
        bool(names),
        "--method is 'smoothquant', which divides norms that linear layers alone read, and this model has "
        "none; choose gptq or awq.",
    )
    before = ("backbone",) if any(path[0] == "backbone" for path in facts.variables) else ()
    readers: dict[Path, list[tuple[Path, int]]] = {}
    for norm, layers in names.items():
        paths = [(*before, "blocks", *name.split("."), "weight") for name in layers]
        readers[(*before, "blocks", norm)] = [
            (p, v.ndim - 1 - v.get_metadata()["inputs"])
            for p in paths
            if (v := facts.variables.get(p)) is not None
        ]
    first = [weights[0][0] for weights in readers.values()]
    seen = calibrate.observe(trained, trained.params, first, rows_RT, ("peaks",), (0, model.layers))
    offset = float(backbone.zero_centered_norm)
    with jax.set_mesh(trained.mesh):
        return unflatten(rounding.smooth(flatten(trained.params), readers, seen, offset))


def _by_layer(trained: Trained, tune: Quantization, places: Mapping[Path, Any], rows_RT: np.ndarray) -> dict:
    """Parameters rounded layer by layer; later ones see what the rounding of earlier ones did."""
    function, names = rounding.BY_LAYER[tune.method]
    flat, layers = flatten(trained.params), trained.run.model.layers
    usual = {p: v for p, v in places.items() if not v.get_metadata().get("lead", 0)}
    made: dict[Path, list[Any]] = {path: [] for path in usual}
    for span in _spans(usual, layers):
        seen = calibrate.observe(trained, unflatten(flat), usual, rows_RT, names, span)
        for path, each in seen.items():
            lead, inputs = few_bits.cuts(usual[path])
            for i, one in enumerate(each, start=span[0]):
                weight = flat[path][i] if lead else flat[path]
                few = function(weight, one, tune.to, inputs)
                made[path].append(few)
                flat[path] = flat[path].at[i].set(few.whole()) if lead else few.whole()
        del seen
    result = flatten(trained.params)
    for path, v in places.items():
        lead, inputs = few_bits.cuts(v)
        own = made.get(path)
        if own:
            result[path] = jax.tree.map(lambda *parts: jnp.stack(parts), *own) if lead else own[0]
            continue
        log.warning("%s was not seen on the text: rounded to the nearest values", module(path))
        few: Any = quantize(result[path], tune.to, lead, inputs)
        scaled = tune.method == "awq" and path in usual
        result[path] = Scaled(few, into=jnp.ones(v.shape[: lead + inputs])) if scaled else few
    return unflatten(result)


def _spans(places: Mapping[Path, Any], layers: int) -> Iterator[tuple[int, int]]:
    """Layers whose sums fit into `ROOM` together, in turn."""
    size = sum(4 * math.prod(_inputs(v)) ** 2 for v in places.values() if few_bits.cuts(v)[0])
    step = max(1, min(layers, ROOM // max(size, 1)))
    for first in range(0, layers, step):
        yield first, min(layers, first + step)


def _inputs(v: nnx.Variable) -> tuple[int, ...]:
    lead, inputs = few_bits.cuts(v)
    return v.shape[lead : lead + inputs]


# ------------------------------------------------------------------------------------ measurements


def compared(before: Trained, after: Trained, texts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Sizes and perplexities of a run and of the same in few bits.

    Perplexity is per token of the texts, or per target of the run's own validation data where there is no
    text; None where there are neither, or labels in place of tokens.
    """
    tune: Any = after.run.tune
    places = few_bits.matrices(about(after.run), tune.skip)
    record: dict[str, Any] = {
        "matrices": sum(math.prod(v.shape[: few_bits.cuts(v)[0]]) for v in places.values()),
        "bytes": {"before": size_of(before.params), "after": size_of(after.params)},
        "on": None, "tokens": 0, "perplexity": None,
    }  # fmt: skip
    try:
        on, found = losses([before, after], texts)
    except UserError as error:
        log.info("perplexity is not measured: %s", error)
        return record
    if found is None:
        return record
    nats = [one["loss"] for one in found]
    return record | {
        "on": on,
        "tokens": int(found[0].get("tokens", found[0].get("targets", 0))),
        "perplexity": dict(zip(("before", "after"), map(math.exp, nats), strict=True)),
    }


def losses(runs: list[Trained], texts: Sequence[np.ndarray]) -> tuple[str, list[dict[str, float]] | None]:
    """Losses of runs on the same texts, or else on their own validation data; and what they are on."""
    run = runs[0].run
    if run.headed is not None:
        return "", None
    if texts and run.writes:
        documents = [Document(ids, 0, 0, 0) for ids in texts]
        return "text held out", [sliding(Scorer.of(one), documents).figures() for one in runs]
    return "its own validation data", [loss_of(one) for one in runs]


def size_of(params: dict) -> int:
    """Bytes of parameters; two elements of 4 bits take one."""
    leaves = jax.tree.leaves(params)
    return sum(
        x.size * (4 if x.dtype in (jnp.int4, jnp.uint4) else 8 * x.dtype.itemsize) // 8 for x in leaves
    )
