"""Tensors of Hugging Face files onto devices, and back.

Import allocates the parameters in their layout and fills them tensor by tensor: a layer's matrix is
read, each device takes its own piece of it, and the stacked parameter, whose memory is donated, is
updated in place. No more than a tensor is ever held by the host.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.convert.family import Family, Model, Path, Slot, abstract, tensors
from jaxgpt.convert.files import DTYPES, Entry, Header, each
from jaxgpt.errors import UserError, require
from jaxgpt.sharding import param_shardings

MOST_PROBLEMS = 30


def usual(family: Family, name: str) -> str:
    """The name that today's transformers give a tensor."""
    for pattern, instead in family.renames:
        name = re.sub(pattern, instead, name)
    return name


def check(
    family: Family, model: Model, found: Mapping[str, Header], where: str
) -> tuple[list[str], list[str]]:
    """Compare the tensors that are there with those that the model has.

    Returns:
      Names of the files' tensors that are used, and of those that are not.

    Raises:
      UserError: all that is unknown, missing, of another shape or of a type that is no weight's.
    """
    table, used, unused, problems = tensors(family, model), [], [], []
    seen: dict[str, str] = {}
    for name, header in found.items():
        plain = usual(family, name)
        original = plain if plain in table else family.tied.get(plain)
        if original in table:
            expected = table[original][0].their_shape
            used.append(name)
            if plain in seen:
                problems.append(f"{name} and {seen[plain]} are the same tensor")
            seen[plain] = name
            if header.shape != expected:
                problems.append(f"{name} has shape {list(header.shape)}, not {list(expected)}")
            if header.dtype not in DTYPES:
                problems.append(f"{name} is of type {header.dtype}; only {', '.join(DTYPES)} can be imported")
        elif re.search(family.unused, name) or re.search(family.unused, plain):
            unused.append(name)
        else:
            problems.append(f"{name} is unknown")
    problems += [f"{name} is missing" for name in table if name not in seen]
    if problems:
        more = f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise UserError(
            f"the tensors of {where} are not those of its {family.model_type} config.json:\n  "
            + "\n  ".join(problems[:MOST_PROBLEMS])
            + f"{more}\nbring the files and config.json of one model together."
        )
    return used, unused


def with_rows(family: Family, model: Model, found: Mapping[str, Header]) -> Model:
    """The model with as many ids as its embedding has rows: config.json may count fewer."""
    name = f"{family.places['embed'].name}.weight"
    shapes = [header.shape for held, header in found.items() if usual(family, held) == name]
    return replace(model, vocab_size=shapes[0][0]) if shapes and shapes[0] else model


def load(
    family: Family,
    model: Model,
    found: Mapping[str, Header],
    names: Sequence[str],
    mesh: jax.sharding.Mesh,
    step: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """The parameters in float32, laid out on the mesh.

    Args:
      family, model: what they are.
      found, names: tensors that `check` has seen.
      mesh: where they go.
      step: called with the bytes of each tensor once it is there.

    Raises:
      UserError: a tensor that should repeat another differs from it.
    """
    table = tensors(family, model)
    twins = _Twins(family, found, table)
    layout = _flat(param_shardings(abstract(model), mesh))
    params = {
        path: jnp.zeros(variable.shape, jnp.float32, device=layout[path])
        for path, variable in nnx.to_flat_state(abstract(model))
    }
    for name, tensor in each(found, names):
        plain = usual(family, name)
        twins.see(plain, tensor)
        for target in table.get(plain, ()):
            part = _spread(target.ours(tensor), layout[target.path], len(target.index))
            index = np.asarray(target.index, np.int32)
            params[target.path] = _filler(layout[target.path])(params[target.path], part, index)
            # A device on the CPU may read the host's own memory: it is freed only after that.
            params[target.path].block_until_ready()
        step(tensor.nbytes)
    twins.check()
    return _nested(params)


def _nested(flat: dict[Path, jax.Array]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = array
    return tree


def _flat(tree: dict[str, Any], path: Path = ()) -> dict[Path, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, part in tree.items() for k, v in _flat(part, (*path, name)).items()}


def _spread(part: np.ndarray, whole: NamedSharding, lead: int) -> jax.Array:
    """One layer's piece of a parameter on the devices, in the type of the file."""
    layout = NamedSharding(whole.mesh, P(*whole.spec[lead:]))
    return jax.make_array_from_callback(part.shape, layout, lambda index: part[index])


@functools.cache
def _filler(layout: NamedSharding) -> Callable[..., jax.Array]:
    """Write one layer into a stacked parameter of this layout, whose memory is reused."""

    def fill(whole: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
        lead = whole.ndim - part.ndim
        start = [index[i] for i in range(lead)] + [0] * part.ndim
        return jax.lax.dynamic_update_slice(whole, part[(None,) * lead].astype(whole.dtype), start)

    return jax.jit(fill, donate_argnums=0, out_shardings=layout)


class _Twins:
    """Whether tensors that repeat another one do: each is read once, so their digests are compared."""

    def __init__(self, family: Family, found: Mapping[str, Header], table: Mapping[str, Any]) -> None:
        here = {usual(family, name) for name in found}
        self.pairs = {a: b for a, b in family.tied.items() if a not in table and {a, b} <= here}
        self.digests: dict[str, bytes] = {}

    def see(self, name: str, tensor: np.ndarray) -> None:
        if name in self.pairs or name in self.pairs.values():
            self.digests[name] = hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).digest()

    def check(self) -> None:
        differ = [f"{a} from {b}" for a, b in self.pairs.items() if self.digests[a] != self.digests[b]]
        require(
            not differ,
            f"the model ties its embedding, but the files' {' and '.join(differ)} differ; "
            "set tie_word_embeddings to false in config.json if it is of its own.",
        )


# ------------------------------------------------------------------------------------------- export


def entries(
    family: Family, model: Model, params: dict[str, Any], dtypes: Mapping[str, str], dtype: str
) -> Iterator[Entry]:
    """The tensors of a model, each made of its parameters when it is written.

    Args:
      family, model: what they are.
      params: on any mesh.
      dtypes: names and types of the file that the model came from; they decide which of several names
        a tensor has, and whether it is written twice. Empty for today's names.
      dtype: of all tensors; empty for those of `dtypes`.
    """
    table, flat = tensors(family, model), _flat(params)
    origins = dtypes or dict.fromkeys(table, "F32")
    for name, own in origins.items():
        plain = usual(family, name)
        targets = table[plain if plain in table else family.tied[plain]]
        make = functools.partial(_collect, targets, flat, DTYPES[dtype or own], name)
        yield Entry(name, dtype or own, targets[0].their_shape, make)


def _collect(targets: list[Slot], flat: Mapping[Path, jax.Array], dtype: np.dtype, name: str) -> np.ndarray:
    """A tensor of all parameters in it."""
    parts = [
        target.theirs(
            np.asarray(_take(flat[target.path], np.asarray(target.index, np.int32), len(target.index)))
        )
        for target in sorted(targets, key=lambda target: target.part)
    ]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    with np.errstate(over="ignore"):
        cast = whole.astype(dtype)
    require(
        dtype != np.float16 or bool(np.isfinite(cast).all()) or not np.isfinite(whole).all(),
        f"{name} has values beyond the range of float16; export it as bfloat16 or float32.",
    )
    return cast


@functools.partial(jax.jit, static_argnums=2)
def _take(whole: jax.Array, index: jax.Array, lead: int) -> jax.Array:
    start = [index[i] for i in range(lead)] + [0] * (whole.ndim - lead)
    sizes = (1,) * lead + whole.shape[lead:]
    return jax.lax.dynamic_slice(whole, start, sizes).reshape(whole.shape[lead:])
