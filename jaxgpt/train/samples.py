"""What a model writes as it learns: greedy continuations of a few validation texts at each evaluation."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxgpt.config import Run
from jaxgpt.data.loader import ValidationBatches
from jaxgpt.errors import UserError
from jaxgpt.files import to_json
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.train.metrics import drop_after

log = logging.getLogger(__name__)

FILE = "samples.jsonl"
GIVEN, WRITTEN = 24, 48
"""Tokens of a text that are given (of a dialogue, all before the first answer), and that are written."""


class Samples:
    """Writes `samples.jsonl` of a run.

    Args:
      run: the config.
      mesh: where parameters live.
      validation: the data whose beginnings are continued.
    """

    generator: Generator

    def __init__(
        self, run: Run, mesh: jax.sharding.Mesh, validation: Mapping[str, ValidationBatches]
    ) -> None:
        self.run, self.mesh, self.validation = run, mesh, validation
        self.prompts: list[list[int]] = []

    def begin(self, tokenizer: Tokenizer, step: int, prompts: Sequence[list[int]] = ()) -> None:
        """Choose what is continued, the first of these prompts or else of the validation data; drop what was
        written after the step that the run goes on from.
        """
        run = self.run
        if not run.train.samples:
            return
        if not run.writes or jax.process_count() > 1:
            why = "several processes" if jax.process_count() > 1 else "a model that writes no text"
            log.warning("train.samples: none are made of a run of %s", why)
            return
        self.tokenizer = tokenizer
        chosen = prompts[: run.train.samples] or self._beginnings()
        self.prompts = [list(ids) for ids in chosen if 0 < len(ids) < run.model.context - run.virtual]
        drop_after(run.folder / FILE, step)

    def _beginnings(self) -> list[list[int]]:
        """The beginnings of the first documents of each source, one of each before the second of any."""
        by_source = []
        for batches in self.validation.values():
            batch = next(iter(batches))
            columns = (
                np.asarray(c)
                for c in (batch.tokens_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)
            )
            rows = (_beginning(*row) for row in zip(*columns, strict=True))
            by_source.append([row for row in rows if row])
        turns = itertools.zip_longest(*by_source)
        found = (row for turn in turns for row in turn if row is not None)
        return list(itertools.islice(found, self.run.train.samples))

    def __call__(self, step: int, params: dict) -> None:
        """Continue every prompt with these parameters and add a line for each."""
        if not self.prompts:
            return
        run = self.run
        try:
            if not hasattr(self, "generator"):
                parts = (run.model, run.compute, params, self.tokenizer)
                self.generator = Generator(*parts, mesh=self.mesh)
            else:
                self.generator.update(params)
            made = self.generator.generate(self.prompts, Sampling(temperature=0), max_new_tokens=WRITTEN)
        except UserError as error:
            log.warning("train.samples: %s", error)
            self.prompts = []
            return
        lines = [
            {"step": step, "prompt": self.tokenizer.decode(prompt), "text": one.text}
            for prompt, one in zip(self.prompts, made, strict=True)
        ]
        with (run.folder / FILE).open("a", encoding="utf-8") as file:
            file.write("".join(to_json(line) + "\n" for line in lines))


def _beginning(
    tokens_T: np.ndarray, weights_T: np.ndarray, segments_T: np.ndarray, positions_T: np.ndarray
) -> list[int]:
    """The beginning of the first document that begins in a row, of a dialogue all before its first answer,
    or of the row where none does; nothing of padding.
    """
    starts = np.flatnonzero((positions_T == 0) & (segments_T > 0))
    first = starts[0] if starts.size else 0
    own = np.flatnonzero((segments_T == segments_T[first]) & (np.arange(len(tokens_T)) >= first))
    trained = np.flatnonzero(weights_T[own] > 0)
    if segments_T[first] == 0 or not trained.size:
        return []
    given = trained[0] + 1 if trained[0] > 0 else min(GIVEN, max(1, len(own) // 2))
    return tokens_T[own][:given].tolist()
