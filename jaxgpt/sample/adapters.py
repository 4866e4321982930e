"""Adapters loaded over the parameters of a generator, which its rows choose from by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.checkpoint.store import load_saved
from jaxgpt.config import GPT, ONE_DEVICE, Compute, LoRA, Model, load_run
from jaxgpt.errors import require
from jaxgpt.models import caches_keys, decoding_params, unstacks
from jaxgpt.sample.load import sampling_mesh
from jaxgpt.sample.program import decoder
from jaxgpt.target import Target
from jaxgpt.tune.base import flatten
from jaxgpt.tune.slots import check_adapter, fill, padded, with_slots

Names = str | Sequence[str | None] | None
"""Of adapters: one for all rows, or one each; None is the base alone."""


class Adapters:
    """A fixed number of slots for LoRA adapters.

    Args:
      model, compute, target: of the generator.
      slots: how many adapters there may be.
      rank: their maximum rank.

    Raises:
      UserError: a model that has no place for them.
    """

    def __init__(self, model: Model, compute: Compute, target: Target, slots: int, rank: int) -> None:
        require(
            caches_keys(model) and isinstance(model, GPT),
            f"a {type(model).__name__} has no slots for adapters; merge each into a run of its own.",
        )
        require(slots >= 1 and rank >= 1, f"slots is {slots} and rank {rank}; both must be at least 1.")
        self.model, self.target, self.slots, self.rank = model, target, slots, rank
        self.state = decoder(model, compute, target)[1]
        self.numbers: dict[str, int] = {}
        """Slot of each adapter by its name; slot 0 stays empty."""

    def make(self, params: dict) -> dict:
        """Parameters with empty slots, of those that decoding runs."""
        params = with_slots(params, self.state, self.slots + 1, self.rank)
        # Slot 0 is filled with nothing: from here on the program of `fill` is compiled, for these layouts.
        return fill(params, jnp.int32(0), padded(flatten(params), {}, LoRA()))

    def load(
        self, params: dict, name: str, folder: str | Path, which: str, mesh: jax.sharding.Mesh | None
    ) -> dict:
        """Parameters with an adapter in a slot: of its name, or the next free one."""
        require(
            name in self.numbers or len(self.numbers) < self.slots,
            f"all {self.slots} slots are taken ({', '.join(self.numbers)}); make more, or use one of these "
            "names again.",
        )
        run = load_run(folder)
        tune = check_adapter(run.tune, self.rank, name)
        require(
            run.model == self.model,
            f"adapter {name} ({folder}) was tuned from another architecture; load it over its own base.",
        )
        learned, _ = load_saved(folder, run, mesh or sampling_mesh(run, ONE_DEVICE), which)
        own: Any = decoding_params(run.model, learned) if unstacks(self.model, self.target) else learned
        adapter = padded(flatten(params), flatten(jax.device_get(own)), tune)
        lost = [path for path in flatten(own) if path[:-1] not in adapter]
        require(not lost, f"adapter {name} has weights of experts, for which there are no slots; merge it.")
        number = self.numbers.get(name, len(self.numbers) + 1)
        params = fill(params, jnp.int32(number), adapter)
        self.numbers[name] = number
        return params

    def of_rows(self, names: Names, rows: int) -> list[int]:
        """The slot of each row's adapter.

        Raises:
          UserError: one that is not loaded, or not one for each row.
        """
        each = [names] * rows if names is None or isinstance(names, str) else list(names)
        require(
            len(each) == rows,
            f"adapters has {len(each)} entries for {rows} prompts; give one per prompt, or one for all.",
        )
        for name in each:
            require(
                name is None or name in self.numbers,
                f"there is no adapter {name!r}; loaded are {', '.join(self.numbers) or 'none'}.",
            )
        return [0 if name is None else self.numbers[name] for name in each]
