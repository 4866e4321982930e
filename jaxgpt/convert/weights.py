"""Tensors of Hugging Face files onto devices, and back.

Import allocates the parameters in their layout and fills them tensor by tensor: a layer's matrix is
read, each device takes its own piece of it, and the stacked parameter, whose memory is donated, is
updated in place. No more than a tensor is ever held by the host.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import GPT
from jaxgpt.convert.family import Family, Model, Path, Slot, abstract, tensors
from jaxgpt.convert.files import DTYPES, Entry, Header, each, shorten
from jaxgpt.errors import require
from jaxgpt.sharding import param_shardings

log = logging.getLogger(__name__)

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_ddp_module)\."
)
"""What torch.compile, data-parallel training and checkpointing put before the names of a module."""
_LAYER = {"layer": r"(?P<layer>\d{1,9})", "expert": r"(?P<expert>\d{1,9})"}


def unwrapped(name: str) -> str:
    """A tensor's name without what training put around the model."""
    return _WRAPPERS.sub("", name)


def usual(family: Family, name: str) -> str:
    """The name that today's transformers give a tensor."""
    name = unwrapped(name)
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
    _check_sizes(family, model, found, where)
    table, used, unused, unknown, wrong = tensors(family, model), [], [], [], []
    seen: dict[str, str] = {}
    for name, header in found.items():
        plain = usual(family, name)
        original = plain if plain in table else family.tied.get(plain)
        if original in table:
            expected = table[original][0].their_shape
            used.append(name)
            if plain in seen:
                wrong.append(f"{seen[plain]} and {name} are the same tensor")
            seen[plain] = name
            if header.shape != expected:
                wrong.append(f"{name} has shape {list(header.shape)}, not {list(expected)}")
            if header.dtype not in DTYPES:
                wrong.append(f"{name} is of type {header.dtype}; only {', '.join(DTYPES)} can be imported")
        elif re.search(family.unused, name) or re.search(family.unused, plain):
            unused.append(name)
        else:
            unknown.append(name)
    missing = sorted(table.keys() - {_stands_for(family, table, seen, plain) or plain for plain in seen})
    problems = [*_many(missing, "missing"), *_many(unknown, "unknown"), *([shorten(wrong)] if wrong else [])]
    headless = missing and not unknown and all(name.startswith(family.head) for name in missing)
    advice = f"take the files of {family.architecture}, with its head" if headless else ""
    require(
        not problems,
        f"the tensors of {where} are not those of its {family.model_type} config.json: "
        f"{'; '.join(problems)}; {advice or 'bring the files and config.json of one model together'}.",
    )
    return used, unused


def _many(names: Sequence[str], what: str) -> list[str]:
    if len(names) < 2:
        return [f"{shorten(names)} is {what}"] * len(names)
    return [f"{len(names)} are {what}: {shorten(names)}"]


def _stands_for(family: Family, table: Collection[str], names: Collection[str], plain: str) -> str | None:
    """The tensor of the model's that a file's is read as; None where it only repeats another one.

    A name that may repeat another stands for it where that one is not there.
    """
    if plain in table:
        return plain
    original = family.tied.get(plain)
    return original if original in table and original not in names else None


def _check_sizes(family: Family, model: Model, found: Mapping[str, Header], where: str) -> None:
    """Refuse a config.json of another size before a table, or an array, of that size is made."""
    counts: dict[str, set[int]] = {"layer": set(), "expert": set()}
    patterns = [
        re.compile(re.escape(place.name).replace(r"\{", "{").replace(r"\}", "}").format(**_LAYER))
        for place in dict.fromkeys(family.places.values())
        if "{layer}" in place.name
    ]
    for name in found:
        plain = usual(family, name)
        for match in filter(None, (pattern.match(plain) for pattern in patterns)):
            for kind, index in match.groupdict().items():
                counts[kind].add(int(index))
    experts = model.moe.experts if isinstance(model, GPT) and model.moe else 0
    sizes = {"layers": (model.layers, len(counts["layer"])), "experts": (experts, len(counts["expert"]))}
    rows = _embeddings(family, found)
    if rows and len(rows[0]) == 2:
        sizes["features of a token"] = (model.width, rows[0][1])
    for what, (said, there) in sizes.items():
        require(
            said == there,
            f"config.json of {where} says {said} {what} but its files have {there} (they hold "
            f"{shorten(found, 3)}); bring the files and config.json of one model together.",
        )


def _embeddings(family: Family, found: Mapping[str, Header]) -> list[tuple[int, ...]]:
    """Shapes of the embedding, the original first where there are copies."""
    name = f"{family.places['embed'].name}.weight"
    shapes = {usual(family, held): header.shape for held, header in found.items()}
    names = [name, *(copy for copy, original in family.tied.items() if original == name)]
    return [shapes[n] for n in names if n in shapes]


def as_found(family: Family, model: Model, found: Mapping[str, Header], config: Mapping[str, Any]) -> Model:
    """The model with what its files decide rather than config.json.

    It has as many ids as its embedding has rows, since config.json may count fewer; and it is tied where
    it has no head and config.json does not say that it is not.
    """
    rows = _embeddings(family, found)
    if rows and rows[0] and rows[0][0] > 0:
        if rows[0][0] != model.vocab_size:
            log.warning(
                "config.json has vocab_size %d, but the embedding has %d rows: taking these",
                model.vocab_size,
                rows[0][0],
            )
        model = replace(model, vocab_size=rows[0][0])
    head = f"{family.head}.weight"
    if not isinstance(model, GPT) or model.tied or config.get("tie_word_embeddings") is not None:
        return model
    if any(usual(family, name) == head for name in found):
        return model
    log.warning("no %s, and config.json has no tie_word_embeddings: the embedding is taken for it", head)
    return replace(model, tied=True)


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
      UserError: a tensor that should repeat another differs from it, or tensors hold NaN or infinity.
    """
    table, here = tensors(family, model), {usual(family, name) for name in found}
    twins, broken = _Twins(family, here, table), list[str]()
    layout = _flat(param_shardings(abstract(model), mesh))
    params = {
        path: jnp.zeros(variable.shape, jnp.float32, device=layout[path])
        for path, variable in nnx.to_flat_state(abstract(model))
    }
    for name, tensor in each(found, names):
        plain = usual(family, name)
        twins.see(plain, tensor)
        if wrong := tensor.size - int(np.isfinite(tensor).sum()):
            broken.append(f"{name} ({wrong:,} of {tensor.size:,})")
        for target in table.get(_stands_for(family, table, here, plain) or "", ()):
            part = _spread(target.ours(tensor), layout[target.path], len(target.index))
            index = np.asarray(target.index, np.int32)
            params[target.path] = _filler(layout[target.path])(params[target.path], part, index)
            # A device on the CPU may read the host's own memory: it is freed only after that.
            params[target.path].block_until_ready()
        step(tensor.nbytes)
    twins.check()
    require(
        not broken,
        f"{len(broken)} tensors hold values that are NaN or infinite: {shorten(broken)}; take files that "
        "were saved before training broke them, or download them again.",
    )
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

    def __init__(self, family: Family, here: set[str], table: Mapping[str, Any]) -> None:
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

    Raises:
      UserError: names that are none of this model.
    """
    table, flat = tensors(family, model), _flat(params)
    plains = {name: usual(family, name) for name in dtypes}
    originals = {name: p if p in table else family.tied.get(p, "") for name, p in plains.items()}
    strange = [name for name, original in originals.items() if original not in table]
    require(
        not strange, f"this model has no {shorten(strange)}, which tensors.json names; restore that file."
    )
    common = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else "F32"
    held = set(originals.values())
    new = {name: common for name in table if name not in held}  # such as a head untied since
    for name, own in {**dtypes, **new}.items():
        targets = table[originals.get(name, name)]
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
        bool(np.isfinite(whole).all()),
        f"{name} holds values that are NaN or infinite; export an earlier checkpoint with --checkpoint.",
    )
    require(
        dtype != np.float16 or bool(np.isfinite(cast).all()),
        f"{name} has values beyond the range of float16; export it as bfloat16 or float32.",
    )
    return cast


@functools.partial(jax.jit, static_argnums=2)
def _take(whole: jax.Array, index: jax.Array, lead: int) -> jax.Array:
    start = [index[i] for i in range(lead)] + [0] * (whole.ndim - lead)
    sizes = (1,) * lead + whole.shape[lead:]
    return jax.lax.dynamic_slice(whole, start, sizes).reshape(whole.shape[lead:])
