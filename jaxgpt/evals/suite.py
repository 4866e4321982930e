"""Scores of a trained run on tasks: answers made in batches, metrics with intervals, paired tests.

Answers are made by the same jitted sampler as everywhere, sorted by prompt length so that batches need little
padding; the next batch is dispatched before the last one is read.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from jaxgpt.config import Task, to_json
from jaxgpt.config.suite import Suite
from jaxgpt.config.tasks import Sample
from jaxgpt.data.knowledge import known_files
from jaxgpt.data.readers.chat import write_dialogue
from jaxgpt.data.readers.tasks import evaluation_samples, evaluation_sources, question
from jaxgpt.data.records import SUFFIXES
from jaxgpt.data.sources import expand
from jaxgpt.errors import NotFinite, require
from jaxgpt.evals.metrics import Interval, Metric, Paired, Prediction, compare, interval, metric_of
from jaxgpt.evals.scoring import Request, Scorer, progress
from jaxgpt.files import parse_json, read_json
from jaxgpt.files import to_json as to_text
from jaxgpt.sample.generate import Completion, Generator
from jaxgpt.sample.load import Trained
from jaxgpt.text.chat import Dialogue, prefix_length

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """A task's predictions and what its metrics make of them.

    Attributes:
      name: of the task.
      task: its config.
      predictions: in the order of the samples.
      rows: statistics of each metric [N, K].
      figures: of each metric, with its interval.
      signatures: of the metrics that have one, what a published figure must name.
    """

    name: str
    task: Task
    predictions: list[Prediction]
    rows: dict[str, np.ndarray]
    figures: dict[str, Interval]
    signatures: dict[str, str]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics by their names."""
        return {name: metric_of(name, f"{self.name}.metrics") for name in self.task.metrics}

    @property
    def titles(self) -> dict[str, str]:
        """Each metric in full."""
        return {name: metric.title for name, metric in self.metrics.items()}

    def against(self, other: Scores, suite: Suite) -> dict[str, Paired]:
        """How the metrics differ from another run's on the same samples."""
        same = [p.sample.key for p in self.predictions] == [p.sample.key for p in other.predictions]
        require(same, f"the two runs answered different samples of {self.name}; score both anew.")
        return {
            name: compare(metric, self.rows[name], other.rows[name], suite.resamples, suite.seed)
            for name, metric in self.metrics.items()
        }


def run_suite(
    trained: Trained,
    suite: Suite,
    batch_size: int = 32,
    split: str = "test",
    saved: Callable[[str, Task], Scores | None] = lambda name, task: None,
) -> Iterator[Scores]:
    """The scores of each task of a suite in turn; every task is read before the first is answered.

    Args:
      trained: a run whose model writes text.
      suite: the tasks.
      batch_size: answers made at a time.
      split: of the tasks' data: `test`, or `validation`, which it is where a task names no test files.
      saved: of a task's name and config, its scores where they are there already.

    Raises:
      UserError: the model writes no text, a task's files cannot be read, or a metric does not exist.
    """
    run = trained.run
    require(
        run.writes,
        f"{trained.folder} holds a {type(run.model).__name__}, which writes no text; a suite scores answers.",
    )
    for name, task in zip(suite.task_names, suite.tasks, strict=True):
        for metric in task.metrics:
            metric_of(metric, f"the metrics of {name}")
    named = list(zip(suite.task_names, suite.tasks, strict=True))
    known = {name: saved(name, task) for name, task in named}
    samples = {
        name: [sample for _, sample in evaluation_samples(task, split)][: suite.limit or None]
        for name, task in named
        if known[name] is None
    }
    parts = (run.model, run.compute, trained.params, trained.tokenizer)
    generator = Generator(*parts, mesh=trained.mesh, bos=trained.bos)
    scorer = Scorer.of(trained)
    for name, task in named:
        yield known[name] or score(
            name,
            task,
            predict(
                generator, scorer, task, samples[name], batch_size=batch_size, seed=suite.seed, about=name
            ),
            suite,
        )


def score(name: str, task: Task, predictions: list[Prediction], suite: Suite) -> Scores:
    """The metrics of predictions, with intervals."""
    found = {metric: metric_of(metric, f"{name}.metrics") for metric in task.metrics}
    rows = {key: metric.statistics(predictions) for key, metric in found.items()}
    figures = {key: interval(metric, rows[key], suite.resamples, suite.seed) for key, metric in found.items()}
    signatures = {key: metric.signature(task.language) for key, metric in found.items()}
    signatures = {key: signature for key, signature in signatures.items() if signature}
    return Scores(name, task, predictions, rows, figures, signatures)


def predict(
    generator: Generator,
    scorer: Scorer | None,
    task: Task,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    seed: int = 0,
    phrasing: str = "",
    about: str = "",
) -> list[Prediction]:
    """What a model answers to the samples of a task, in their order.

    Args:
      generator: writes the answers.
      scorer: of the same model, for metrics that need likelihoods; None where there are none.
      task: how samples are asked and answers read.
      samples: what is asked.
      batch_size: answers made at a time.
      seed: of sampling; sample i has seed + i.
      phrasing: how samples are asked; empty means the task's held-out way.
      about: what the progress line says; nothing for none.
    """
    asked = [question(task, sample, phrasing or task.held_out) for sample in samples]
    made = answers(generator, task, asked, batch_size=batch_size, seed=seed, about=about)
    needs = {metric_of(name).needs for name in task.metrics} - {""}
    require(
        not needs or scorer is not None, f"metrics of {task.name} need likelihoods, but there is no scorer."
    )
    choices: list[tuple[float, ...]] = [()] * len(samples)
    references: list[tuple[float, int] | None] = [None] * len(samples)
    if scorer is not None and "choices" in needs:
        choices = _choices(scorer, task, samples, asked, batch_size, about)
    if scorer is not None and "reference" in needs:
        pairs = [(turns, task.target(sample)) for sample, turns in zip(samples, asked, strict=True)]
        references = list(_likelihoods(scorer, task, pairs, batch_size, about))
    parts = zip(samples, asked, made, choices, references, strict=True)
    return [
        Prediction(
            sample, turns[-1]["content"], one.text, task.extract(one.text, sample), task.language,
            tuple(one.logprobs), choice, reference,
        )
        for sample, turns, one, choice, reference in parts
    ]  # fmt: skip


def answers(
    generator: Generator,
    task: Task,
    asked: Sequence[Dialogue],
    *,
    batch_size: int = 32,
    seed: int = 0,
    about: str = "",
) -> list[Completion]:
    """An answer to each prompt, in their order; an empty one, said and counted, where there is no room.

    Args:
      generator: writes them.
      task: its template, decoding and length of answers.
      asked: turns up to the answer.
      batch_size: answers made at a time.
      seed: of sampling.
      about: what the progress line says.

    Raises:
      NotFinite: the logits of an answer are not finite.
    """
    call = _call(generator, task, asked)
    prompts = call["prompts"]
    found: list[Completion] = [Completion([], [], "length", "", seed + i) for i in range(len(prompts))]
    fit = [i for i, ids in enumerate(prompts) if len(ids) < generator.context]
    if lost := len(prompts) - len(fit):
        log.warning(
            "%d of %d prompts of %s leave no room for an answer in the context of %d tokens; they count as "
            "not "
            "answered", lost, len(prompts), about or task.name, generator.context,
        )  # fmt: skip
    order = sorted(fit, key=lambda i: len(prompts[i]), reverse=True)
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def dispatch(part: list[int]) -> Any:
        own: dict[str, Any] = {k: [v[i] for i in part] if isinstance(v, list) else v for k, v in call.items()}
        seeds = [(seed + i) % 2**32 for i in part]
        return generator.begin(**own, decoding=task.decoding, max_new_tokens=task.max_new_tokens, seeds=seeds)

    for part, result in zip(parts, _behind(map(dispatch, progress(parts, about))), strict=True):
        for i, completion in zip(part, result(), strict=True):
            if completion.finish_reason == "error":
                raise NotFinite("logits in an answer are")
            found[i] = completion
    return found


def _behind(running: Iterator[Any]) -> Iterator[Any]:
    """Each of them once the next was made."""
    last: list[Any] = []
    for one in running:
        yield from last
        last = [one]
    yield from last


def _call(generator: Generator, task: Task, asked: Sequence[Dialogue]) -> dict[str, Any]:
    """What a generator takes to answer, prompts written as in training."""
    if task.template == "none":
        return generator.texts([turns[-1]["content"] for turns in asked], bos=True)
    return generator.dialogues(asked)


def _choices(
    scorer: Scorer,
    task: Task,
    samples: Sequence[Sample],
    asked: Sequence[Dialogue],
    batch_size: int,
    about: str,
) -> list[tuple[float, ...]]:
    pairs = [(turns, c) for sample, turns in zip(samples, asked, strict=True) for c in sample.choices]
    scores = iter(_likelihoods(scorer, task, pairs, batch_size, about))
    return [tuple(next(scores)[0] for _ in sample.choices) for sample in samples]


def _likelihoods(
    scorer: Scorer, task: Task, pairs: Sequence[tuple[Dialogue, str]], batch_size: int, about: str
) -> list[tuple[float, int]]:
    """Log-probability and tokens of each answer to its prompt, its end included, written as in training."""
    requests: list[Request] = []
    prefix, cut = [], 0
    for turns, answer in pairs:
        example = write_dialogue([*turns, {"role": "assistant", "content": answer}], task, scorer.tokenizer)
        last = len(example.weights) - 1 - example.weights[::-1].index(1.0)
        first = last - example.weights[: last + 1][::-1].index(0.0) + 1
        scored = example.tokens[first : last + 1]
        cut += len(scored) > scorer.context
        requests.append((example.tokens[:first], scored[: scorer.context]))
        prefix.append(prefix_length(turns, scorer.tokenizer) if task.template != "none" else first)
    if cut:
        log.warning(
            "%d of %d answers of %s are longer than the context of %d tokens; their ends are not scored",
            cut, len(pairs), about or task.name, scorer.context,
        )  # fmt: skip
    scores = scorer.token_logprobs(requests, batch_size, about, prefix)
    return [(one.logprob, one.tokens) for one in scores]


# ------------------------------------------------------------------------------------------ on disk


class SavedSample(TypedDict):
    """A sample in a file of predictions."""

    values: dict[str, str]
    answers: tuple[str, ...]
    turns: tuple[dict[str, Any], ...]
    choices: tuple[str, ...]
    facts: dict[str, Any]


class Saved(TypedDict):
    """A line of a file of predictions."""

    sample: SavedSample
    prompt: str
    text: str
    answer: str
    language: str
    logprobs: tuple[float, ...]
    choices: tuple[float, ...]
    reference: tuple[float, int] | None


class SavedScores(TypedDict):
    """What is read again of a task's results."""

    digest: NotRequired[str]


def digest(trained: Trained, suite: Suite, task: Task, split: str = "test") -> str:
    """Of all that predictions depend on: checkpoint, task with its files and code, samples, seed."""
    files = expand(evaluation_sources(task, split)[0], (*SUFFIXES, *task.suffixes))
    files += known_files(task.knowledge) if task.knowledge else []
    own = (getattr(task, field.name) for field in fields(task))  # such as a table of names
    files += [value for value in own if isinstance(value, str) and value and Path(value).is_file()]
    files += [path for kind in type(task).__mro__[:-1] if (path := inspect.getsourcefile(kind))]
    stamps = [(f, s.st_size, s.st_mtime_ns) for f in dict.fromkeys(files) for s in [Path(f).stat()]]
    facts = [
        str(trained.folder.resolve()),
        trained.step,
        to_json(task),
        suite.limit,
        suite.seed,
        split,
        stamps,
    ]
    return hashlib.sha256(to_text(facts).encode()).hexdigest()[:16]


def saved_scores(path: Path, wanted: str, name: str, task: Task, suite: Suite) -> Scores | None:
    """The scores of predictions that were saved beside the results `path`, if they are those wanted."""
    lines = path.with_suffix(".predictions.jsonl")
    fix = "remove it, and it is made anew"
    if not (path.is_file() and lines.is_file()) or read_json(path, SavedScores, fix).get("digest") != wanted:
        return None
    found = [parse_json(line, Saved, lines, fix) for line in lines.read_bytes().splitlines() if line.strip()]
    if not found:
        return None
    parts: list[dict[str, Any]] = [dict(one) for one in found]
    predictions = [Prediction(**part | {"sample": Sample(**part["sample"])}) for part in parts]
    log.info("%s: its predictions are used again", path)
    return score(name, task, predictions, suite)


def prediction_records(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Predictions as JSON."""
    return [asdict(p) for p in predictions]
