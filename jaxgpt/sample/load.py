"""A run's checkpoint, loaded whole: config, tokenizer, mesh and parameters of one step."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import NamedTuple

import jax

from jaxgpt.checkpoint import load_params
from jaxgpt.config import ONE_DEVICE, ROW_AXES, Mesh, Run, load_run
from jaxgpt.sharding import make_mesh
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """One checkpoint of a run and what belongs to it."""

    folder: Path
    run: Run
    params: dict
    """In the training form (layers stacked), on the mesh."""
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    step: int
    others: tuple[Trained, ...] = ()
    """Further runs whose predicted labels are averaged with this one's (an ensemble)."""

    def __repr__(self) -> str:
        return f"Trained({str(self.folder)!r}, step {self.step})"

    @property
    def bos(self) -> bool:
        """Whether a text begins with `<|bos|>`, as those that the model was trained on.

        Text that `jaxgpt data prepare` wrote does, and so does a prompt without a template. A model that was
        imported and not trained here (step 0), or on dialogues alone, follows its tokenizer's convention.
        """
        prepared = self.step > 0 and not self.run.templated
        return prepared or self.tokenizer.adds_bos


def load_trained(
    folder: str | Path, *, which: str = "best", mesh: Mesh = ONE_DEVICE, verify: bool = True
) -> Trained:
    """A run's checkpoint.

    Args:
      folder: the run's folder.
      which: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.
      verify: compare the checkpoint's checksums, and refuse parameters that are not finite.

    Raises:
      UserError: no run, no such checkpoint, or a mesh that does not fit the model or this machine.
    """
    run, folder = load_run(folder), Path(folder)
    tokenizer, placed = load_tokenizer(folder / "tokenizer"), sampling_mesh(run, mesh)
    params, step = load_params(folder, run, placed, which, verify=verify)
    log.info("checkpoint: step %s of %s", step, folder)
    return Trained(folder, run, params, tokenizer, placed, step)


def sampling_mesh(run: Run, mesh: Mesh) -> jax.sharding.Mesh:
    """A mesh of as many of this process's devices as these axes ask for.

    Axes that ask for more, or for all with a -1, get the devices of all processes, and every process
    must take part; otherwise each works on its own devices and finds the same.

    Raises:
      UserError: too few devices, or axes that do not divide the model.
    """
    asked, here = math.prod(dataclasses.asdict(mesh).values()), jax.local_devices()
    devices = here[:asked] if 0 < asked <= len(here) else jax.devices()
    sizes = mesh.resolve(len(devices))
    batch = dataclasses.replace(run.train, batch_size=math.prod(sizes[a] for a in ROW_AXES), accumulate=1)
    dataclasses.replace(run, mesh=mesh, train=batch).check_mesh(len(devices))
    return make_mesh(sizes, devices)
