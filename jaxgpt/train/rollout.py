"""Rollouts: batches that the model in training makes itself, by answering prompts; and their evaluation.

Token ids go from the sampler into the batch as they are, with the log-probabilities that they were drawn by.
Text is made of them for the rewards alone.

Shapes: P prompts, G completions per prompt, B = P G rows, S slots, T tokens per row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.batch import Batch
from jaxgpt.config import GRPO, Compute, Prompts, Run
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.prompts import Prompt, PromptRows
from jaxgpt.errors import NotFinite, require
from jaxgpt.objectives import drawn_by, extra_columns
from jaxgpt.sample import program as sampling
from jaxgpt.sample.program import Made, Rows
from jaxgpt.sample.settings import Sampling
from jaxgpt.sample.strategies import controls_of, features_of, host
from jaxgpt.sharding import replicated, row_shards, spec
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.completions import Completions, HeldRow, advantages, to_batch
from jaxgpt.train.rewards import Rewards
from jaxgpt.train.state import Program

_TRAINING, _EVALUATION = 0, 1  # so that their seeds differ


class Rollouts(Iterator[Batch]):
    """Training batches made by the model itself: the data of a run with rewards.

    Before each batch, `use` says by which parameters. A rollout serves `GRPO.updates` batches.

    Args:
      run: the config.
      tokenizer: of the model.
      part: places in the batch of the rows that this process trains on; None means all.

    Raises:
      UserError: no prompts, or rewards that cannot be called.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer, part: Sequence[int] | None = None) -> None:
        assert isinstance(run.objective, GRPO) and isinstance(run.data, Prompts)
        self.run, self.tokenizer, self.config = run, tokenizer, run.objective
        rows, group = run.train.batch_size, self.config.group
        require(  # not of every `Run`: sampling takes other batches
            rows % group == 0,
            f"train.batch_size {rows} is not divisible by objective.group {group}; a step holds whole groups "
            "of completions.",
        )
        self.rewards = Rewards.of(self.config)
        self.rows, self.held_out = (self._read(seed) for seed in (run.train.seed, None))
        self._part, self._apart = part, run.data.template != "none"
        self._at, self._left, self._held = 0, 0, list[HeldRow]()
        self._figures: dict[int, dict[str, float]] = {}
        self._now: dict[str, float] = {}

    def _read(self, seed: int | None) -> PromptRows:
        rows = rows_of(self.run.data, self.tokenizer, self.run.length, seed, self.run.train.batch_size)
        assert isinstance(rows, PromptRows)
        return rows

    def begin(self, program: Program, base: Any = None, reference: dict | None = None) -> None:
        """Get ready to sample from the model of this program.

        Args:
          program: of training.
          base: the frozen part of its model; None for none.
          reference: parameters of the whole model that it stays close to, if it does.
        """
        self._base = base
        if self.config.kl is not None:
            self._refer = reference_of(self.run, program, self.tokenizer, base, reference)
        config, longest = self.config, max(len(p.ids) for p in (*self.rows.prompts, *self.held_out.prompts))
        self._width = sampling.bucket(longest, self.run.length)
        self._mesh = program.mesh
        self._drawing = drawing(config)
        self._draw = self._sampler(program, self._drawing, config.group)
        asked, each = (self._drawing, config.eval_samples) if config.eval_samples else (GREEDY, 1)
        self._asking, self._each = asked, each
        whole = math.lcm(each, row_shards(program.mesh))  # rows that divide over prompts and devices alike
        self._prompts_at_once = max(1, self.run.train.batch_size // whole) * whole // each
        self._ask = self._sampler(program, asked, each)

    def _sampler(self, program: Program, how: Sampling, group: int) -> Callable[..., Made]:
        return sampler(self.run, program, self.tokenizer.vocab_size, how, group, self.run.length)

    def use(self, step: int, params: Any) -> None:
        """Make the next batch, that of this step, by these parameters, once they are there."""
        self._step, self._params = step, jax.block_until_ready(params)

    def __iter__(self) -> Rollouts:
        return self

    def __next__(self) -> Batch:
        if not self._left:
            self._held, self._now = self._rollout()
            self._left = self.config.updates
        self._left -= 1
        self._figures = {s: f for s, f in self._figures.items() if s >= self._step - 2}
        self._figures[self._step] = self._now
        batch = to_batch(self._held, self.run.length, self.rows.pad)
        return batch if self._part is None else jax.tree.map(lambda a: a[list(self._part)], batch)

    # ------------------------------------------------------------------------------------ drawing

    def _rollout(self) -> tuple[list[HeldRow], dict[str, float]]:
        """Whole groups for a batch, and figures about them."""
        config, start = self.config, time.perf_counter()
        wanted, rows, spare = self.run.train.batch_size // config.group, list[HeldRow](), list[HeldRow]()
        rewards, lengths, flat, rounds = list[float](), list[int](), 0, 0
        while len(rows) < wanted * config.group and rounds <= config.redraws:
            rounds += 1
            numbers = range(self._at, self._at + wanted)
            made = self._complete(self._draw, self._drawing, self.rows, numbers, config.group, _TRAINING)
            gains = advantages(made.rewards_B, config.group, config.scale)
            rewards += made.rewards_B.tolist()
            lengths += made.new_B.tolist()
            for i, number in enumerate(numbers):
                at = range(i * config.group, (i + 1) * config.group)
                signal = np.ptp(made.rewards_B[at.start : at.stop]) > 0
                flat += not signal
                chosen = rows if signal or not config.redraws else spare
                chosen += made.rows(at, gains[at.start : at.stop])
                self._at = number + 1
                if len(rows) == wanted * config.group:
                    break
        rows += spare[: wanted * config.group - len(rows)]
        if config.kl is not None:
            self._add_reference(rows)
        seconds = time.perf_counter() - start
        groups = len(rewards) // config.group
        return rows, {
            "reward": float(np.mean(rewards)),
            "reward_std": float(np.std(rewards)),
            "no_signal": flat / groups,
            "completion_length": float(np.mean(lengths)),
            "epoch": self._at / len(self.rows.prompts),
            "rollout_seconds": seconds,
            "rollout_tokens_per_second": float(np.sum(lengths)) / seconds,
        }

    def _add_reference(self, rows: list[HeldRow]) -> None:
        """Give every row the reference's log-probabilities, a microbatch at a time."""
        size = len(rows) // self.run.train.accumulate
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = to_batch(part, self.run.length, self.rows.pad)
            with jax.set_mesh(self._mesh):
                batch = jax.device_put(batch, NamedSharding(self._mesh, spec(("batch",))))
                logprob_BT = jax.device_get(self._refer(batch))
            for row, logprob_T in zip(part, logprob_BT, strict=True):
                row["reference"] = logprob_T[row["prompt"] - 1 : len(row["ids"]) - 1].tolist()

    def _complete(
        self,
        draw: Callable[..., Made],
        how: Sampling,
        source: PromptRows,
        numbers: Sequence[int],
        each: int,
        kind: int,
    ) -> Completions:
        """Answer the prompts of these numbers, `each` times each."""
        prompts = [source.prompt(number) for number in numbers for _ in range(each)]
        seeds = [s for n in numbers for s in _seeds(self.run.train.seed, kind, n, each)]
        with jax.set_mesh(self._mesh):
            made: Any = jax.device_get(draw(self._params, self._base, self._place(prompts, how, seeds)))
        if made.failed_B.any():
            raise NotFinite("the model's logits in a rollout are")
        last_B = made.tokens_BS[np.arange(len(prompts)), made.length_B - 1]
        stopped_B = np.isin(last_B, self.tokenizer.stop_ids)
        ends = [int(n) - bool(s) for n, s in zip(made.length_B, stopped_B, strict=True)]
        texts = [
            self.tokenizer.decode(row[len(p.ids) : end].tolist(), () if self._apart else p.ids)
            for row, p, end in zip(made.tokens_BS, prompts, ends, strict=True)
        ]
        rewards_B = self.rewards(prompts, texts)
        drawn = {name: getattr(made, name) for name in ("tokens_BS", "logprobs_BS", "kept_BS", "length_B")}
        return Completions(prompts, stopped_B=stopped_B, rewards_B=rewards_B, **drawn)

    def _place(self, prompts: Sequence[Prompt], how: Sampling, seeds: Sequence[int]) -> Rows:
        """What the sampler is asked, on the mesh."""
        tokens_BT = np.zeros((len(prompts), self._width), np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt.ids)] = prompt.ids
        length_B = host([len(prompt.ids) for prompt in prompts], np.int32)
        end_B = np.minimum(length_B + self.config.max_new_tokens, self.run.length)
        stop_BN = host([self.tokenizer.stop_ids] * len(prompts), np.int32)
        controls = controls_of([how] * len(prompts), seeds)
        rows = Rows(host(tokens_BT, np.int32), length_B, length_B, end_B, stop_BN, controls)
        return jax.device_put(rows, NamedSharding(self._mesh, spec(("batch",))))

    # --------------------------------------------------------------------------------- evaluation

    def evaluate(self, batches: int = 0) -> dict[str, float]:
        """Figures over the validation prompts (of `batches` batches, if not 0) by the parameters in use:
        `reward`, its spread, the mean length of a completion and the share that ended by itself.
        """
        at_once, found, count = self._prompts_at_once, list[tuple[np.ndarray, ...]](), len(self.held_out)
        for start in range(0, count if not batches else min(count, batches * at_once), at_once):
            # The last batch is filled with prompts of the first, so that one program does.
            numbers = [n % count for n in range(start, start + at_once)]
            part = self._complete(self._ask, self._asking, self.held_out, numbers, self._each, _EVALUATION)
            real = min(at_once, count - start) * self._each
            found.append((part.rewards_B[:real], part.new_B[:real], part.stopped_B[:real]))
        rewards_N, new_N, stopped_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return {
            "reward": float(rewards_N.mean()),
            "reward_std": float(rewards_N.std()),
            "completion_length": float(new_N.mean()),
            "stopped": float(stopped_N.mean()),
        }

    # ----------------------------------------------------------- what the loop asks of its data

    @property
    def epoch_rows(self) -> int:
        """Rows of the batches in which each prompt is drawn once."""
        return len(self.rows.prompts) * self.config.group * self.config.updates

    def progress(self, step: int) -> dict[str, float]:
        """Figures of the rollout that a step learned from."""
        return self._figures.get(step, {})

    @property
    def extra(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the extra columns of one row."""
        return extra_columns(self.run)

    def get_state(self) -> dict[str, Any]:
        """Where the prompts stand, and the rollout whose steps are not all done, as JSON."""
        state: dict[str, Any] = {"row": self._at, "data": self.rows.fingerprint}
        if self._left:
            state["rollout"] = {"left": self._left, "rows": self._held, "figures": self._now}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a state of `get_state`; `UserError` when it belongs to other prompts."""
        require(
            state["data"] == self.rows.fingerprint,
            f"the checkpoint stopped in the prompts {state['data']}, but the config reads "
            f"{self.rows.fingerprint}; restore data, data.length and train.seed, or start anew.",
        )
        self._at, held = int(state["row"]), state.get("rollout")
        self._left, self._held, self._now = (
            (held["left"], held["rows"], held["figures"]) if held else (0, [], {})
        )

    def close(self) -> None:
        """Nothing is read ahead."""


GREEDY = Sampling(temperature=0.0)


def drawing(config: GRPO) -> Sampling:
    """How rollouts are sampled."""
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)


def sampler(run: Run, program: Program, vocab: int, how: Sampling, group: int, slots: int) -> Any:
    """The jitted program of a rollout: (trained parameters, frozen ones, rows) to what was made.

    It reads the parameters of training, which it brings into the form of decoding inside; so no second copy
    outlives it.

    Args:
      run: the config.
      program: of training.
      vocab: ids from here on are never drawn.
      how: rows are sampled.
      group: rows that share a prompt.
      slots: tokens per row at most.
    """
    compute, target = Compute(dtype=run.compute.dtype, attention=run.compute.attention), program.target
    static = sampling.Program(
        *(run.model, compute, target, slots, vocab),
        *(features_of([how], drawn=True), group),
    )

    def rollout(params: Any, base: Any, rows: Rows) -> Made:
        whole = program.tuning.enter(params, {} if base is None else base, None)
        return sampling.generate(static, sampling.prepare(run.model, compute, target, whole), rows)

    return jax.jit(rollout)


def reference_of(
    run: Run, program: Program, tokenizer: Tokenizer, base: Any, params: dict | None
) -> Callable[[Batch], jax.Array]:
    """What gives the log-probabilities [B, T] of a batch's targets by the model that a run starts from.

    That is the model as its tuning begins: beside the frozen part, only what is trained is held once more.

    Args:
      run: the config.
      program: of training.
      tokenizer: ids outside it are never drawn.
      base: the frozen part; None for none.
      params: of the whole model.
    """
    assert isinstance(run.objective, GRPO) and params is not None
    drawn = drawn_by(run.objective, Vocabulary.of(tokenizer))
    key = jax.random.fold_in(jax.random.key(run.train.seed), 1)
    with jax.set_mesh(program.mesh):
        born = jax.jit(program.tuning.init, out_shardings=program.shardings.params)(key, params)

    def score(born: Any, base: Any, batch: Batch) -> jax.Array:
        model = program.model(born, base)
        return model.drawn_logprobs(model.hidden(batch, None).x_BTD, batch.targets_BT, None, drawn)[0]

    return partial(jax.jit(score, out_shardings=replicated(program.mesh)), born, base)


def _seeds(seed: int, kind: int, number: int, count: int) -> list[int]:
    """Seeds of a prompt's completions: of this run's seed and the prompt's number alone."""
    return np.random.SeedSequence([seed, kind, number]).generate_state(count, np.uint32).tolist()
