"""Rewards of dialogues by a trained reward model.

Shapes: B rows, T tokens per row, N dialogues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import ONE_DEVICE, Compute, Mesh, Model, RewardModel
from jaxgpt.config.data import Dialogues
from jaxgpt.data.loader import ValidationBatches
from jaxgpt.data.packing import Item, PackedExamples
from jaxgpt.data.readers.chat import write_dialogue
from jaxgpt.errors import NotFinite, UserError, require, shown
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sharding import row_shards
from jaxgpt.target import Target
from jaxgpt.text.chat import Dialogue

BATCH = 32


def judged(where: str, name: str, function: Callable[..., Any], values: tuple[Any, ...], at: str) -> float:
    """The number that a user's function gives for a completion.

    Args:
      where: the field that names it.
      name: of it, as FILE.py:NAME.
      function: it.
      values: its arguments.
      at: what they are, in words.

    Raises:
      UserError: it raises an error, or returns what is no finite number.
    """
    file, _, own = name.rpartition(":")
    where = f"{where}: {own}() of {file}"
    try:
        value = function(*values)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise UserError(f"{where} raised {why} {at}; return a number for every completion.") from error
    number = value.item() if isinstance(value, np.generic | np.ndarray) and np.size(value) == 1 else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise UserError(f"{where} returned {shown(value)} {at}; it must return a finite number.")
    return float(number)


class Judge:
    """Gives dialogues the reward of a trained reward model.

    Args:
      trained: its run.

    Raises:
      UserError: the run is of no reward model.
    """

    def __init__(self, trained: Trained) -> None:
        run = trained.run
        require(
            isinstance(run.model, RewardModel),
            f"{trained.folder} holds a {type(run.model).__name__}, which gives no rewards; name a run of a "
            "RewardModel.",
        )
        self.trained, self.data = trained, cast(Dialogues, run.data)

    @classmethod
    def load(
        cls, folder: str | Path, *, which: str = "best", mesh: Mesh = ONE_DEVICE, verify: bool = True
    ) -> Judge:
        """The judge of a run's folder; see `load_trained`."""
        return cls(load_trained(folder, which=which, mesh=mesh, verify=verify))

    def __call__(self, dialogues: Sequence[Dialogue], batch_size: int = BATCH) -> np.ndarray:
        """The reward of the last answer of each dialogue [N], float32.

        Dialogues are packed into rows as in training, which changes no reward.

        Args:
          dialogues: turns that end with an assistant's.
          batch_size: rows at a time.

        Raises:
          UserError: a dialogue has no answer at its end, or is longer than the model's context.
          NotFinite: a reward is not finite.
        """
        run, mesh, tokenizer = self.trained.run, self.trained.mesh, self.trained.tokenizer
        items = [self._item(dialogue, number) for number, dialogue in enumerate(dialogues)]
        reward_N = np.zeros(len(items), np.float32)
        if not items:
            return reward_N
        rows = PackedExamples(items, run.model.context, self.data.bins, None, tokenizer.control["<|pad|>"])
        batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # a few texts fill no whole batch
        batch_size += -batch_size % row_shards(mesh)
        static, order = (run.model, replace(run.compute, remat="none"), Target.of(mesh)), iter(rows.order)
        with jax.set_mesh(mesh):
            for batch in ValidationBatches(rows, batch_size):
                reward_BT, segments_BT = jax.device_get(
                    (_rewards(*static, self.trained.params, batch), batch.segments_BT)
                )
                for reward_T, segments_T, numbers in zip(reward_BT, segments_BT, order, strict=False):
                    ends = np.flatnonzero(np.diff(segments_T, append=0) != 0)[: len(numbers)]
                    reward_N[numbers] = reward_T[ends]
        if not np.isfinite(reward_N).all():
            raise NotFinite("rewards are")
        return reward_N

    def _item(self, dialogue: Dialogue, number: int) -> Item:
        context = self.trained.run.model.context
        require(
            bool(dialogue) and dialogue[-1]["role"] == "assistant",
            f"dialogue {number} does not end with an assistant's turn, which is what is rewarded; add one.",
        )
        example = write_dialogue(dialogue, self.data, self.trained.tokenizer)
        count = len(example.tokens)
        require(
            count <= context,
            f"dialogue {number} has {count} tokens but the reward model's context is {context}; shorten it.",
        )
        return Item.whole(example)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _rewards(model: Model, compute: Compute, target: Target, params: dict, batch: Batch) -> Any:
    module: Any = assemble(abstract_model(model, compute, target)[0], params)
    reward_BT = module.rewards(module.hidden(batch).x_BTD, batch.segments_BT)
    return jax.lax.with_sharding_constraint(reward_BT, P())  # for every process
