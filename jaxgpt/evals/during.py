"""Scores of tasks while a run trains: what the loop's `scores` hook is."""

from __future__ import annotations

import jax

from jaxgpt.config import Run, Task
from jaxgpt.config.tasks import Sample
from jaxgpt.data.readers.tasks import evaluation_samples
from jaxgpt.errors import require
from jaxgpt.evals.metrics import metric_of
from jaxgpt.evals.scoring import Scorer
from jaxgpt.evals.suite import predict
from jaxgpt.sample.generate import Generator
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.train.hooks import Score, Scores


def task_scores(run: Run, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Scores | None:
    """The metrics of a run's tasks, of `train.eval_examples` validation samples each, spread over the files.

    Answers are made by the jitted sampler of every command, of the parameters of training.

    Raises:
      UserError: a metric does not exist, a task has no validation data, or the run has several processes.
    """
    if not run.train.eval_examples:
        return None
    require(
        jax.process_count() == 1,
        "train.eval_examples scores answers in a run of one process; set it to 0 here, and score checkpoints "
        "with `jaxgpt eval RUN --suite`.",
    )
    metrics = {
        name: {
            key: metric_of(metric, f"the metrics of {name}")
            for key, metric in zip(task.metric_names, task.metrics, strict=True)
        }
        for name, task in run.tasks.items()
    }
    samples = {name: _spread(task, run.train.eval_examples) for name, task in run.tasks.items()}
    kept: list[Generator] = []

    def scores(params: dict) -> dict[str, Score]:
        if not kept:
            kept.append(Generator(run.model, run.compute, params, tokenizer, mesh=mesh))
        else:
            kept[0].update(params)
        needed = any(metric.needs for found in metrics.values() for metric in found.values())
        scorer = Scorer(run.model, run.compute, params, tokenizer, mesh) if needed else None
        made = {}
        for name, task in run.tasks.items():
            predictions = predict(kept[0], scorer, task, samples[name], seed=run.train.seed)
            for key, metric in metrics[name].items():
                value = metric.of(metric.statistics(predictions))
                made[f"{name}:{key}"] = Score(value, metric.higher_is_better)
        return made

    return scores


def _spread(task: Task, count: int) -> list[Sample]:
    """That many validation samples at equal distances, or all."""
    found = [sample for _, sample in evaluation_samples(task)]
    return found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]
