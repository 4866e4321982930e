"""The training loop: `jaxgpt train`.

Dispatch never waits: a step's numbers are fetched after the next step was dispatched.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.checkpoint import Checkpoints, load_params, measure, not_finite
from jaxgpt.checkpoint.whole import whole_model
from jaxgpt.config import GRPO, PromptTuning, Quantization, Run, load_run
from jaxgpt.data.loader import TrainIterator, ValidationBatches, train_iterator, validation_parts
from jaxgpt.data.readers import run_tokenizer
from jaxgpt.errors import require
from jaxgpt.layers.product_type import with_type
from jaxgpt.models import flops_per_token, init_memory, parameter_counts
from jaxgpt.objectives import make_objective
from jaxgpt.objectives.measures import measured
from jaxgpt.optim import schedule
from jaxgpt.runtime import memory_errors, require_memory
from jaxgpt.sharding import batch_sharding, make_mesh, place_rows, process_rows
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.changes import branching_step, check_base
from jaxgpt.train.fisher import remember
from jaxgpt.train.hooks import (
    BESIDE,
    Claim,
    MakeScores,
    Patience,
    Profile,
    Score,
    Scores,
    claimed,
    claimed_base,
    note_best,
)
from jaxgpt.train.host import Host, Memory
from jaxgpt.train.metrics import Meter, Metrics, peak_flops
from jaxgpt.train.noise import SQUARE, NoiseScale
from jaxgpt.train.reference import add_reference, has_reference
from jaxgpt.train.rollout import Rollouts
from jaxgpt.train.samples import Samples
from jaxgpt.train.signals import Interrupted, StopSignal
from jaxgpt.train.state import Program, State, freeze, init_state, make_program, state_bytes
from jaxgpt.train.step import evaluation_sums, jit_eval_step, jit_train_step, loss_means
from jaxgpt.train.teacher import load_teacher
from jaxgpt.train.trackers import chosen

log = logging.getLogger(__name__)

Pending = tuple[int, dict[str, jax.Array], float | None]
"""A step whose numbers are not on record yet: the arguments of `Loop.report`."""
beside = partial(jax.profiler.annotate_function, name=BESIDE)
_LESS = (
    "lower train.batch_size, raise train.accumulate, set compute.remat to full, or spread the model over "
    "more devices with mesh.fsdp"
)
"""What to do about memory."""


class Diverged(RuntimeError):
    """Parameters are not finite, or the loss or gradient of too many updates in a row."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: last step done.
      best: the lowest validation loss (nats per target) or error, see `Train.best_by`.
      reason: `finished`, `patience` or the signal's name.
    """

    step: int
    best: float
    reason: str


def train(
    run: Run,
    *,
    progress: bool = True,
    verify: bool = True,
    source: Path | None = None,
    self_contained: bool = False,
    scores: MakeScores | None = None,
    profile: Profile | None = None,
) -> Result:
    """Train a run to its end, from where its folder stands.

    Args:
      run: the config.
      progress: show a progress line on standard error.
      verify: compare the checksums of what is loaded.
      source: the config file, to be kept with the run.
      scores: makes what tasks are scored by at each evaluation (`evals.during.task_scores`).
      self_contained: keep a copy of the parameters that are tuned, not only their place.
      profile: looks at some of the steps (`profile.profiler`).

    Raises:
      UserError: config, data, mesh, memory or folder do not fit each other, or the folder is in use.
      Diverged: see `Train.max_bad_steps`; or parameters are not finite.
    """
    require(
        not isinstance(run.tune, Quantization),
        f"tune is {type(run.tune).__name__}(...), which trains nothing; set it to Full(), or name the run in "
        "init_from and tune LoRA() over it.",
    )
    mesh = make_mesh(run.check_mesh(jax.device_count()))
    run, tokenizer = with_type(run, Target.of(mesh)), run_tokenizer(run)
    field = "model.backbone.vocab_size" if run.headed else "model.vocab_size"
    require(
        tokenizer.vocab_size <= run.model.vocab_size,
        f"{field} {run.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
        f"set it to {tokenizer.vocab_size} or more.",
    )
    part = process_rows(batch_sharding(mesh), run.train.batch_size)
    shape = {"model_length": run.length, "batch_size": run.train.batch_size, "task": run.task, "part": part}
    validation: dict[str, ValidationBatches] = {}
    if isinstance(run.objective, GRPO):
        data = Rollouts(run, tokenizer, part)
    else:
        data = train_iterator(run.data, tokenizer, seed=run.train.seed, **shape)
        validation = validation_parts(run.data, tokenizer, **shape)
    run = run.with_steps(data.epoch_rows)

    if profile:
        profile.check(run.train.steps)
    chosen(run)  # what it names is installed
    scored = scores(run, tokenizer, mesh) if scores else None
    require(
        scored is not None or not run.train.eval_examples,
        "train.eval_examples is set, but this call of train() was given no scores; pass "
        "evals.during.task_scores.",
    )
    text = tokenizer.encode(run.tune.text) if isinstance(run.tune, PromptTuning) else ()
    program = make_program(run, mesh, text=text)
    check_base(run, tokenizer)
    require_memory(state_bytes(program), "parameters, gradients and optimizer", _LESS)
    stop, step = StopSignal(), 0
    try:  # the folder comes after all checks: a mistake leaves nothing behind
        with memory_errors(_LESS), stop, closing(data), claimed(run, tokenizer) as claim:
            stop.clean_up = claim.withdraw
            kept = {"keep": run.train.keep, "always": branching_step(run)}
            with closing(Checkpoints(run.folder, **kept)) as checkpoints:
                base = claimed_base(run, mesh, copy=self_contained, verify=verify)
                if has_reference(run):
                    splits = {"train": data.rows, "validation": validation[""].rows}
                    add_reference(run, mesh, splits, base, verify=verify, progress=progress)
                if teacher := load_teacher(run, tokenizer, mesh, verify=verify):
                    program = replace(program, teacher=teacher.graphdef)
                state, memory = _start(run, program, checkpoints, data, verify, claim.changes.until, base)
                loop, step = Loop(run, program, checkpoints, data, validation, memory), int(state.step)
                loop.scores = scored
                loop.base = freeze(program, whole_model(run, base)) if base and program.base else None
                loop.teacher = teacher.params if teacher else None
                if step == 0:
                    state = remember(run, program, state, loop.base, tokenizer)
                if isinstance(data, Rollouts):
                    data.begin(program, loop.base, whole_model(run, base) if base else None)
                del base
                if profile:
                    profile.check(run.train.steps, step)
                if reason := loop.ended(step):
                    return Result(step, loop.patience.best, reason)
                claim.begin(checkpoints, step, source)
                metrics = Metrics(run, run.train.steps, step, progress=progress)
                profiling = closing(profile) if profile else nullcontext()
                with jax.set_mesh(mesh), closing(metrics) as loop.metrics, profiling as loop.profile:
                    if claim.changes.fields:
                        metrics.write(step, {"event": "changed", "changes": str(claim.changes)})
                    asked = [p.ids for p in data.held_out.prompts] if isinstance(data, Rollouts) else ()
                    loop.samples.begin(tokenizer, step, asked)
                    loop.compile(state, Vocabulary.of(tokenizer))
                    stop.begin()
                    return loop.run_steps(state, stop, claim)
    except Interrupted:
        return Result(step, math.inf, stop.name)


def _start(
    run: Run,
    program: Program,
    checkpoints: Checkpoints,
    data: TrainIterator | Rollouts,
    verify: bool,
    until: int | None,
    base: dict | None,
) -> tuple[State, Memory]:
    """The state to go on from, of step `until` at the latest, and the loop's memory; the data are set to
    where they stopped. `base` holds the parameters of the run to start from.
    """
    restored = checkpoints.restore(program.abstract, Host, verify=verify, until=until)
    if restored:
        state, host = restored
        data.set_state(host["data"])
        log.info("resuming %s at step %d of %d", run.folder, int(state.step), run.train.steps)
        memory: Memory = host["loop"]
        if not checkpoints.has_best(until):
            memory.pop("best", None)  # it was set apart, or removed by hand: the next one is the best again
        return state, memory
    if base is None and run.init_from:
        base, step = load_params(run.init_from, load_run(run.init_from), program.mesh, verify=verify)
        log.info("starting from %s, step %d", run.init_from, step)
    params = None if base is None else whole_model(run, base)
    return init_state(run, program, params), {"waited": 0, "skipped": 0}


class Loop:
    """The state of one process of training beside the arrays: compiled steps, sinks, memory."""

    metrics: Metrics
    step_fn: Any
    eval_fn: Callable[..., tuple[dict[str, jax.Array], Any]]
    base: dict | None
    """The frozen part of the model, where not all of it is trained."""
    teacher: dict | None
    """Parameters of the model that is distilled."""
    memory_fn: Callable[[], Any]
    score: Score
    """Of the last evaluation, what makes a checkpoint the best."""
    scores: Scores | None = None
    """Of tasks, at each evaluation."""
    profile: Profile | None = None

    def __init__(
        self,
        run: Run,
        program: Program,
        checkpoints: Checkpoints,
        data: TrainIterator | Rollouts,
        validation: Mapping[str, ValidationBatches],
        memory: Memory,
    ) -> None:
        self.run, self.program, self.checkpoints = run, program, checkpoints
        self.data, self.validation = data, validation
        self.patience = Patience(run.train.patience, memory.get("best", math.inf), memory["waited"])
        self.skipped, self.bad = memory["skipped"], 0
        self.noise = None
        if run.train.noise_scale:
            sizes = run.train.batch_size, run.train.accumulate
            self.noise = NoiseScale(*sizes, memory.get("noise", (0.0, 0.0)))
        self.by = "reward" if isinstance(run.objective, GRPO) else run.train.best_by
        self.branching = branching_step(run)
        self.layout = batch_sharding(program.mesh)
        self.part = process_rows(self.layout, run.train.batch_size)
        self.samples = Samples(run, program.mesh, validation)
        self.meter = Meter(
            tokens=run.train.batch_size * run.length,
            flops=flops_per_token(run.model, run.length),
            peak=peak_flops(jax.devices()[0], run.compute.dtype) * jax.device_count(),
        )
        self.rate = jax.jit(schedule(run.optim, run.train.steps))

    def put(self, batch: Batch) -> Batch:
        """The rows of this process as its part of the global batch."""
        if jax.process_count() == 1:
            return batch  # the compiled steps lay it out themselves, at no cost
        rows = self.run.train.batch_size
        return jax.tree.map(lambda a: place_rows(self.layout, rows, self.part, a), batch)

    def compile(self, state: State, vocabulary: Vocabulary) -> None:
        """Compile the training step ahead of time; record trace, lowering and compile seconds."""
        train, program = self.run.train, self.program
        objective = make_objective(self.run.objective, vocabulary)
        learned = measured(self.run.measures, objective, vocabulary)
        step = jit_train_step(self.run, program, learned)
        times = [time.perf_counter()]
        columns = {"types": self.run.typed, "extra": self.data.extra}
        batch = Batch.abstract(train.batch_size, self.run.length, self.layout, **columns)
        traced = step.trace(state, batch, self.base, self.teacher)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        self.step_fn = lowered.compile()
        times.append(time.perf_counter())
        self.require_room()
        names = ("trace_seconds", "lower_seconds", "compile_seconds")
        seconds = {n: round(b - a, 3) for n, a, b in zip(names, times, times[1:], strict=False)}
        sizes = {
            "parameters": parameter_counts(self.run.model)["total"],
            "trained_parameters": sum(x.size for x in jax.tree.leaves(self.program.split(state.params)[0])),
            "tokens_per_step": self.meter.tokens,
        }
        self.metrics.write(int(state.step), {"event": "compiled", **seconds, **sizes})
        self.eval_fn = jit_eval_step(self.run, program, objective)
        # A fresh memory of every device's own rows, made anew for each evaluation.
        self.memory_fn = jax.jit(
            lambda: init_memory(
                self.run.model, self.run.compute, program.target, train.batch_size, evaluation=True
            ),
            out_shardings=self.layout,
        )

    def whole(self, params: dict) -> dict:
        """The parameters of the whole model, of those that are trained."""
        return params if self.base is None else jax.jit(self.program.tuning.merge)(params, self.base)

    def require_room(self) -> None:
        """Refuse a step whose temporary arrays have no place beside the state, before it runs."""
        if (sizes := self.step_fn.memory_analysis()) is not None:
            devices, temporary = self.program.mesh.local_devices, sizes.temp_size_in_bytes
            require_memory(dict.fromkeys(devices, temporary), "temporary arrays of a step", _LESS)

    def ended(self, step: int) -> str:
        """Why there is no step after this one, or nothing."""
        return "patience" if self.patience.over else "finished" if step >= self.run.train.steps else ""

    def run_steps(self, state: State, stop: StopSignal, claim: Claim) -> Result:
        """Steps until the end, early stopping or a signal."""
        train, step, pending = self.run.train, int(state.step), None
        saved, reason = step if step else None, ""
        self.meter.start(step)
        self.metrics.begin(step)
        while not reason:
            if self.profile and step + 1 == self.profile.first:
                self.settle(pending, claim)
                pending = None
                self.begin_profile(step, state)
            if isinstance(self.data, Rollouts):
                self.data.use(step + 1, state.params)
            with self.meter.waiting():
                batch = self.put(next(self.data))
            begun = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = self.step_fn(state, batch, self.base, self.teacher)
            step += 1
            # Where a call returns only with its result (on a CPU), the step is done by now.
            done = time.perf_counter() if cast(Any, metrics["loss"]).is_ready() else None
            if pending:  # where this one is done, that one was when it began
                self.report(pending[0], pending[1], pending[2] or (begun if done else None))
                claim.keep()
            pending = (step, metrics, done)
            if self.profile and step == self.profile.last:
                jax.block_until_ready((state, metrics))
                self.end_profile((step, metrics, done or time.perf_counter()), claim)
                pending = None
            stopping, last = stop.seen(step, train.log_every), step == train.steps
            evaluating = last or step % train.eval_every == 0
            saving = last or stopping or step % train.save_every == 0 or step == self.branching
            if evaluating or saving:  # a checkpoint's own step is on record before it is written
                self.settle(pending, claim)
                pending = None
                self.require_finite(step, state)
            score = self.evaluate(step, state) if evaluating else None
            best = score is not None and self.patience.update(score)
            if best:
                note_best(self.run, self.by, self.score, step)
            reason = self.ended(step) or (stop.name or "another process's signal" if stopping else "")
            # In the middle of bad steps the parameters may be what is bad: keep those before.
            whole = bool(reason) or (saving and self.bad == 0)
            if best or whole:
                # A run that has a checkpoint has one to go on from.
                whole = whole or train.best_holds == "all" or not self.checkpoints.whole_steps()
                self.save(state, score if best else None, whole)
                saved = step if whole else saved
        self.checkpoints.finish()
        log.info("%s at step %d (%s); saved at step %s", self.run.folder, step, reason, saved)
        return Result(step, self.patience.best, reason)

    def settle(self, pending: Pending | None, claim: Claim) -> None:
        """Log the step whose numbers are not on record yet, if there is one."""
        if pending:
            self.report(*pending)
            claim.keep()

    def begin_profile(self, step: int, state: State) -> None:
        """Trace what comes after this step, when it is done."""
        assert self.profile is not None
        jax.block_until_ready(state)
        self.profile.begin(self.run.folder)
        self.meter.start(step)

    def end_profile(self, last: Pending, claim: Claim) -> None:
        """Print what the trace says, and log its last step, which is done."""
        assert self.profile is not None
        for line in self.profile.end(self.step_fn):
            self.metrics.print(line)
        self.settle(last, claim)
        self.meter.start(last[0])

    @beside
    def save(self, state: State, score: float | None, whole: bool) -> None:
        """Save the state with the data's position and the loop's memory.

        Args:
          state: what to save.
          score: what `evaluate` returned, if that is the lowest so far.
          whole: or the parameters alone, see `Train.best_holds`.
        """
        memory: Memory = {"waited": self.patience.waited, "skipped": self.skipped}
        if math.isfinite(self.patience.best):  # JSON has no infinity
            memory["best"] = self.patience.best
        if self.noise:
            memory["noise"] = (self.noise.averages[0], self.noise.averages[1])
        self.checkpoints.save(state, {"data": self.data.get_state(), "loop": memory}, score, whole=whole)

    def report(self, step: int, metrics: dict[str, jax.Array], done: float | None) -> None:
        """Fetch a step's numbers; log them when it is their turn; abort when too many were bad.

        Args:
          step: the step.
          metrics: of `train_step`, perhaps still being computed.
          done: when they were known to be there, if they were.
        """
        train = self.run.train
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        done = done or time.perf_counter()
        self.bad = int(values["bad_steps"])
        self.skipped += self.bad > 0
        if self.noise:
            self.noise.update(values.pop(SQUARE), values["grad_norm"] ** 2)
            values["noise_scale"] = self.noise.rows_of_noise
        if self.bad >= train.max_bad_steps:
            raise self.diverged(
                f"{self.bad} updates in a row up to step {step} had a loss or gradient that is not finite"
            )
        if step % train.log_every and step != train.steps and step > 1:
            return
        self.checkpoints.check()
        record = (
            self.meter.record(step, values, done)
            | self.data.progress(step)
            | {
                "learning_rate": float(np.asarray(self.rate(step - self.skipped - (self.bad == 0)))),
                "skipped": self.skipped,
            }
        )
        self.metrics.write(step, record)
        speed = f"{record['tokens_per_second']:,.0f} tok/s mfu {record['mfu']:.0%}"
        rate = f"lr {record['learning_rate']:.2e} grad_norm {record['grad_norm']:.3g}"
        reward = f"reward {record['reward']:.3f} " if "reward" in record else ""
        line = f"{reward}loss {record['loss']:.3f} {rate} {speed} epoch {record['epoch']:.2f}"
        self.metrics.note(line, done=step)

    @beside
    def require_finite(self, step: int, state: State) -> None:
        """Refuse parameters that are NaN or infinite before they are measured or saved."""
        if bad := not_finite(measure(state.params)):
            raise self.diverged(f"at step {step} parameters are NaN or infinite: {bad} (numbers of elements)")

    def diverged(self, words: str) -> Diverged:
        """The error that ends the run; it names the last good checkpoint, which is on disk by then."""
        self.checkpoints.finish()
        steps = self.checkpoints.whole_steps()
        last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
        return Diverged(
            f"{words}; {last} in {self.run.folder}: "
            "lower optim.peak_lr, lengthen optim.warmup_steps, or look at the data."
        )

    def _sums(self, state: State, batches: Iterable[Batch]) -> list[dict[str, jax.Array]]:
        batches = map(self.put, itertools.islice(batches, self.run.train.eval_batches or None))
        return evaluation_sums(self.eval_fn, state.params, batches, self.memory_fn(), self.base)

    @beside
    def evaluate(self, step: int, state: State) -> float:
        """The `Train.best_by` of the state: validation loss (nats per target), or share of targets missed.

        Over every validation token or `eval_batches` batches.
        """
        if isinstance(self.data, Rollouts):
            return self.evaluate_rewards(self.data, step, state)
        run = self.run
        parts = {name: self._sums(state, batches) for name, batches in self.validation.items()}
        means = loss_means([part for sums in parts.values() for part in sums])
        record = {f"val_{name}": mean for name, mean in means.items() if name != "targets"}
        words = f"step {step}: validation loss {means['loss']:.4f}"
        for name, sums in parts.items():
            if name:
                of_source = loss_means(sums)
                record |= {f"val_{key}/{name}": of_source[key] for key in ("loss", "accuracy")}
                words += f", {name} {of_source['loss']:.4f}"
        found = self.scores(self.whole(state.params)) if self.scores else {}
        for name, score in found.items():
            source, _, metric = name.rpartition(":")
            record[f"val_{metric}/{source}"] = score.value
            words += f", {name} {score.value:.2f}"
        self.note_evaluation(step, state, words, record)
        loss, by = means["loss"], run.train.best_by
        if not math.isfinite(loss):
            return loss
        chosen = {"loss": Score(loss, False), "error": Score(1 - means.get("accuracy", 0.0), False)} | found
        self.score = chosen[by]
        return -self.score.value if self.score.higher_is_better else self.score.value

    def evaluate_rewards(self, rollouts: Rollouts, step: int, state: State) -> float:
        """Minus the mean reward of completions of the validation prompts."""
        rollouts.use(step, state.params)
        found = rollouts.evaluate(self.run.train.eval_batches)
        self.score = Score(found["reward"], True)
        words = f"step {step}: validation reward {found['reward']:.4f}"
        self.note_evaluation(step, state, words, {f"val_{name}": value for name, value in found.items()})
        return -found["reward"]

    def note_evaluation(self, step: int, state: State, words: str, record: Mapping[str, float]) -> None:
        """Log an evaluation, and begin to measure speed anew."""
        self.metrics.print(words)  # before what may fail: saving it
        self.metrics.write(step, record)
        if self.run.train.samples:
            self.samples(step, self.whole(state.params))
        self.metrics.draw()
        self.meter.start(step)
