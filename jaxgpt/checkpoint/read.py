"""One step's files read and checked: the same answer on every process, and nothing is moved here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxgpt.checkpoint.checksum import Sums, digest, measure, shapes_of
from jaxgpt.checkpoint.damage import Damaged, Shapes, as_damage, changed, not_finite, require_fit
from jaxgpt.errors import NotFinite, UserError
from jaxgpt.files import parse_json

log = logging.getLogger(__name__)

T = TypeVar("T")
_OK, _DAMAGED, _FAILED = range(3)


def read_step(
    folder: Path, targets: Mapping[str, Any], host: Any = None, *, verify: bool = True
) -> tuple[dict[str, Any], Any]:
    """Items of one checkpoint in the layouts of their targets.

    Args:
      folder: of the step.
      targets: abstract trees by the names of the items.
      host: what the data's position and the loop's memory must be (a schema); None leaves them out.
      verify: compare checksums, and refuse parameters that are not finite.

    Returns:
      The trees by name, and what `host` asked for.

    Raises:
      Damaged: on every process, if it is on one.
      UserError: it does not fit the targets, or holds parameters that are not finite.
      OSError: the system could not read it, which says nothing of it.
    """
    layouts = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(dict(targets))]
    shared = any(layout is not None and not layout.is_fully_addressable for layout in layouts)

    def read() -> tuple[Sums | None, dict[str, Any], Any]:
        sums = _sums(folder)
        known = _host(folder, host, sums) if host is not None else None
        return sums, {name: _tree(folder, name, target, sums) for name, target in targets.items()}, known

    sums, trees, known = _agreed(read, folder, shared)
    if verify:
        _verify(folder, trees, sums)
    return trees, known


def _agreed(read: Callable[[], T], folder: Path, shared: bool) -> T:
    """What `read` returns, if it returns on every process that shares the arrays."""
    value: Any = None
    error: Exception | None = None
    try:
        value = read()
    except Exception as raised:  # whatever a damaged file makes the readers raise
        error = raised if isinstance(raised, Damaged | UserError) else as_damage(raised, folder)
    worst = _OK if error is None else _DAMAGED if isinstance(error, Damaged) else _FAILED
    own = worst
    if shared:
        worst = int(multihost_utils.process_allgather(np.array(own)).max())
    if error is not None and own == worst:
        raise error
    if worst == _FAILED:
        raise UserError(f"another process could not read {folder}; its own output says why.")
    if worst == _DAMAGED:
        raise Damaged("another process found it")
    return value


def _sums(folder: Path) -> Sums | None:
    """The checksums that were saved with the step; None of one saved without."""
    path = folder / "sums" / "metadata"
    if not path.parent.exists():
        return None
    sums = _parsed(path, Sums)
    if sums["digest"] != digest({name: value for name, value in sums.items() if name != "digest"}):
        raise Damaged("its checksums are not those that were saved")
    return sums


def _host(folder: Path, kind: Any, sums: Sums | None) -> Any:
    path = folder / "host" / "metadata"
    if sums is not None and digest(_parsed(path, dict[str, Any])) != sums["host"]:
        raise Damaged("its data position is not what was saved")
    return _parsed(path, kind)


def _parsed(path: Path, kind: type[T]) -> T:
    try:
        return parse_json(path.read_bytes(), kind, path, "")
    except UserError as error:
        raise Damaged(str(error).removesuffix("; .")) from None


def _tree(folder: Path, name: str, target: Any, sums: Sums | None) -> Any:
    """One item's arrays, once it is known that they are what the target wants."""
    wanted, what = shapes_of(target), f"checkpoint {folder.name} of {folder.parents[1]}"
    if sums is not None:
        if name not in sums["arrays"]:
            raise Damaged(f"it was saved without {name}")
        require_fit({p: (leaf.shape, leaf.dtype) for p, leaf in sums["arrays"][name].items()}, wanted, what)
    # Not by the manager: where reading fails on one process, the others would wait in its barrier.
    with closing(ocp.StandardCheckpointHandler()) as handler:
        path = epath.Path(folder / name)
        try:
            return handler.restore(path, args=ocp.args.StandardRestore(target))
        except Exception:
            held = None if sums is not None else _stored_shapes(handler, path)
            if held is not None:
                require_fit(held, wanted, what)
            raise


def _stored_shapes(handler: Any, path: epath.Path) -> Shapes | None:
    """What Orbax's own lists say is there, of a checkpoint without checksums; None where they are damaged."""
    try:
        return shapes_of(handler.metadata(path).tree)
    except Exception:
        return None


def _verify(folder: Path, trees: Mapping[str, Any], sums: Sums | None) -> None:
    """Compare the arrays with their checksums, on every process alike."""
    if sums is None:
        log.info("%s has no checksums (an older version saved it): damage inside may go unnoticed", folder)
    for name, tree in trees.items():
        leaves = measure(tree)
        if sums is not None and (differ := changed(leaves, sums["arrays"][name])):
            raise Damaged(f"checksums of {name} differ: {differ}")
        if name == "params" and (bad := not_finite(leaves)):
            where = f"checkpoint {folder.name} of {folder.parents[1]}"
            raise NotFinite(f"in {where} elements of parameters, namely {bad}, are")


def trusted_score(path: Path) -> bool:
    """Whether Orbax's file of a step's score can be read, and is what was saved with the step."""
    try:
        sums, found = _sums(path.parents[1]), _parsed(path, dict[str, float])
        return bool(found) and (sums is None or digest(found) == sums["metrics"])
    except FileNotFoundError:  # another process was faster
        return True
    except Damaged:
        return False
