"""`jaxgpt export RUN FOLDER --format stablehlo`: prefill and decoding as programs that jax alone runs.

Shapes: B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Compute, Mesh
from jaxgpt.convert import standalone, tokenizers
from jaxgpt.convert.folders import refuse_filled, whole
from jaxgpt.errors import require
from jaxgpt.files import require_writable, write_bytes, write_json, write_text
from jaxgpt.layers.cache import init_cache
from jaxgpt.models import assemble, caches_keys, context_of
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sample.program import decoder, prepare
from jaxgpt.sample.settings import Verify
from jaxgpt.target import Target
from jaxgpt.tune.few_bits import whole_params

_PLATFORMS = ("cpu", "cuda", "tpu")
_TARGET = Target("cpu", "cpu")
"""Layers one after the other, and no kernel of one platform alone."""
_README = """# {name}

A language model exported by `jaxgpt export --format stablehlo`: `prefill.stablehlo` and `decode.stablehlo`
are programs that `jax.export.deserialize` reads (for {platforms}), `weights.npz` holds what they take first.
`generate.py` is a whole example that needs jax and flatbuffers alone:

    python generate.py {example} --count 20

Ids come from the tokenizer whose files are here; a text begins with {begins}. Rows: {rows}; context:
{context} tokens. See the head of generate.py for the arguments of both programs.
"""


def export_stablehlo(
    source: Path, target: Path, checkpoint: str, verify: Verify, mesh: Mesh, dtype: str, rows: int = 1
) -> None:
    """A run as two programs, their weights, its tokenizer and a script that runs them.

    Raises:
      UserError: a model that does not decode with a cache, or a type that programs are not written in.
    """
    refuse_filled(target, "a model")
    require(
        importlib.util.find_spec("flatbuffers") is not None,
        "jax writes programs by flatbuffers, which is not installed; run `pip install 'jaxgpt[stablehlo]'`.",
    )
    require(
        dtype in ("", "float32", "bfloat16"),
        f"--dtype is {dtype!r} but programs are written in float32 or bfloat16; take one of these.",
    )
    require_writable(target.parent)
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        caches_keys(trained.run.model),
        f"the model is a {type(trained.run.model).__name__}, which decodes without a cache; only GPTs that "
        "write text are exported so.",
    )
    compute = Compute(dtype=dtype or trained.run.compute.dtype, attention="xla")  # type: ignore[arg-type]
    weights, programs, about = _programs(trained, compute, rows)
    words = trained.tokenizer
    about |= {"stop": [int(i) for i in words.stop_ids], "bos": trained.bos and words.control["<|bos|>"]}
    with whole(target, sum(x.nbytes for x in weights)) as work:
        for name, data in programs.items():
            write_bytes(work / f"{name}.stablehlo", data)
        bits = [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in weights]
        np.savez(work / "weights.npz", *bits)
        write_json(work / "about.json", about)
        write_bytes(work / "generate.py", Path(standalone.__file__).read_bytes())
        begins = f"id {about['bos']}" if trained.bos else "its first token"
        fields = {"rows": rows, "context": about["context"], "platforms": ", ".join(_PLATFORMS)}
        example = words.control["<|bos|>"]
        write_text(
            work / "README.md",
            _README.format(name=trained.run.name, begins=begins, example=example, **fields),
        )
        tokenizers.write(work, words, source / "tokenizer", dialogues=trained.run.templated)
    print(
        f"{target}: prefill and decode, {len(weights)} weights; try `python {target}/generate.py {example}`"
    )


def _programs(
    trained: Trained, compute: Compute, rows: int
) -> tuple[list[np.ndarray], dict[str, bytes], dict[str, Any]]:
    """The weights, the serialized programs, and what a caller must know of them."""
    model: Any = trained.run.model
    params = prepare(model, compute, _TARGET, whole_params(trained.params))
    leaves, tree = jax.tree.flatten(params)
    context, kind = context_of(model, params), jnp.dtype(compute.dtype)
    shapes, cache_tree = jax.tree.flatten(
        jax.eval_shape(lambda: init_cache(model, _TARGET, rows, context, kind))
    )
    graphdef, _ = decoder(model, compute, _TARGET)

    def prefill(weights: list[jax.Array], tokens_BT: jax.Array, length_B: jax.Array) -> Any:
        module: Any = assemble(graphdef, tree.unflatten(weights))
        x_BTD, cache = module.decode(tokens_BT, None, init_cache(model, _TARGET, rows, context, kind))
        last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
        logits_BV = module.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])
        return logits_BV, jax.tree.leaves(cache)

    def decode(weights: list[jax.Array], token_B: jax.Array, position_B: jax.Array, cache: Any) -> Any:
        module: Any = assemble(graphdef, tree.unflatten(weights))
        x_BTD, cache = module.decode(token_B[:, None], position_B, cache_tree.unflatten(cache))
        return module.logits(x_BTD[:, 0]), jax.tree.leaves(cache)

    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    row, prompt = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows, context)))
    made = {
        "prefill": jax.export.export(jax.jit(prefill), platforms=_PLATFORMS)(abstract, prompt, row),
        "decode": jax.export.export(jax.jit(decode), platforms=_PLATFORMS)(abstract, row, row, shapes),
    }
    weights = [np.asarray(jax.device_get(x)) for x in leaves]
    about: dict[str, Any] = {"rows": rows, "context": context, "ids": trained.tokenizer.vocab_size}
    about["dtypes"] = [str(x.dtype) for x in weights]
    return weights, {name: bytes(program.serialize()) for name, program in made.items()}, about
