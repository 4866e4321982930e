"""How much a model loses when its texts, or the ways to ask it, are disturbed (`jaxgpt eval RUN --robust`).

Every perturbation is scored on the same examples as the undisturbed text: drops and their intervals are those
of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Labelled, Sample, Suite, Tagged, Task
from jaxgpt.data.readers import encode_split
from jaxgpt.data.readers.tagging import to_bio
from jaxgpt.data.readers.tasks import evaluation_samples
from jaxgpt.errors import UserError
from jaxgpt.evals.metrics import METRICS, Interval, Metric, Prediction, compare, metric_of
from jaxgpt.evals.perturb import PERTURBATIONS, perturb, perturb_words
from jaxgpt.evals.predict import BATCH, classify, labelling, tag
from jaxgpt.evals.scoring import Scorer
from jaxgpt.evals.suite import predict
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import Trained


class Drop(NamedTuple):
    """What one perturbation costs.

    Attributes:
      name: of the perturbation.
      about: what it does.
      clean, disturbed: the metric without and with it.
      drop: clean less disturbed (the other way round where lower is better), with its interval over examples.
      changed: share of the examples that it changes at all.
    """

    name: str
    about: str
    clean: float
    disturbed: float
    drop: Interval
    changed: float


@dataclass(frozen=True)
class Robustness:
    """Drops under every perturbation, of one metric of so many examples."""

    metric: str
    examples: int
    drops: list[Drop]

    def table(self) -> str:
        """The drops in lines."""
        head = f"{'':<15}{'clean':>8}{'disturbed':>11}{'drop':>8}   95 % interval    changed"
        lines = []
        for d in self.drops:
            ends = "–" if d.drop.low is None else f"{d.drop.low:6.2f} to {d.drop.high:6.2f}"
            figures = f"{d.clean:8.2f}{d.disturbed:11.2f}{d.drop.value:8.2f}"
            lines.append(f"{d.name:<15}{figures}   {ends:<17}{d.changed:7.0%}  ({d.about})")
        return "\n".join([head, *lines])


def drop_of(
    name: str, about: str, metric: Metric, clean: np.ndarray, disturbed: np.ndarray, changed: float
) -> Drop:
    """The drop between two sets of statistics [N, K] of the same examples."""
    sides = (clean, disturbed) if metric.higher_is_better else (disturbed, clean)
    found = compare(metric, *sides).difference
    return Drop(name, about, metric.of(clean), metric.of(disturbed), found, changed)


@dataclass(frozen=True)
class _Gold:
    answers: tuple[str, ...]
    choices: tuple[str, ...]


def label_robustness(
    trained: Trained, split: str = "validation", batch_size: int = BATCH, seed: int = 0, limit: int = 0
) -> Robustness:
    """Accuracy of a classifier, or F1 of a tagger's entities, on disturbed texts of its own data.

    Of a tagger's sentences, words of entities are neither dropped nor moved, and what is put in is no entity.

    Args:
      trained: a run of a Classifier.
      split: of its data.
      batch_size: rows at a time.
      seed: of the perturbations.
      limit: most examples, the first ones; 0 means all.

    Raises:
      UserError: the run tells no labels apart, or the split names no files.
    """
    task, data = labelling(trained)
    examples, _ = encode_split(data, trained.tokenizer, trained.run.length, split, task)
    examples = examples[: limit or None]
    score, name = (_tagged, "F1 of entities") if isinstance(data, Tagged) else (_labelled, "accuracy")
    metric, statistics = score(trained, batch_size)
    clean, _ = statistics(examples, None, seed)
    drops = []
    for kind, what in PERTURBATIONS.items():
        rows, changed = statistics(examples, kind, seed)
        drops.append(drop_of(kind, what.about, metric, clean, rows, changed))
    return Robustness(name, len(examples), drops)


Statistics = Callable[[Sequence[Any], str | None, int], tuple[np.ndarray, float]]
"""Of examples, a perturbation or None, and a seed: the rows of statistics, and the share that it changes."""


def _labelled(trained: Trained, batch_size: int) -> tuple[Metric, Statistics]:
    task, data = labelling(trained)
    assert isinstance(data, Labelled)

    def statistics(examples: Sequence[Any], kind: str | None, seed: int) -> tuple[np.ndarray, float]:
        texts = [e.text if kind is None else perturb(e.text, kind, seed) for e in examples]
        given = [text if e.pair is None else (text, e.pair) for text, e in zip(texts, examples, strict=True)]
        found = classify(trained, given, batch_size, kind or "undisturbed")
        predictions = [
            Prediction(_Gold((e.label,), task.labels), text, p.label, p.label)
            for e, text, p in zip(examples, texts, found, strict=True)
        ]
        changed = np.mean([text != e.text for text, e in zip(texts, examples, strict=True)])
        return METRICS["accuracy"].statistics(predictions), float(changed)

    return METRICS["accuracy"], statistics


def _tagged(trained: Trained, batch_size: int) -> tuple[Metric, Statistics]:
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        raise UserError(
            "entities are counted by seqeval, which is not installed; run `pip install 'jaxgpt[eval]'`."
        ) from None

    def sentence(example: Any, kind: str | None, seed: int) -> tuple[list[str], list[str]]:
        """Words and tags."""
        words, tags = list(example.words), list(to_bio(example.tags, "bio"))
        if kind is None:
            return words, tags
        changed = perturb_words(words, kind, [bio == "O" for bio in tags], seed)
        return [word for word, _ in changed], ["O" if i < 0 else tags[i] for _, i in changed]

    def statistics(examples: Sequence[Any], kind: str | None, seed: int) -> tuple[np.ndarray, float]:
        given = [sentence(example, kind, seed) for example in examples]
        found = tag(trained, [words for words, _ in given], batch_size, kind or "undisturbed")
        rows = []
        for (_, gold), words in zip(given, found, strict=True):
            right, made = set(get_entities(gold)), set(get_entities([word.tag for word in words]))
            rows.append([len(right & made), len(made), len(right)])
        changed = [words != list(e.words) for (words, _), e in zip(given, examples, strict=True)]
        return np.asarray(rows, np.float64), float(np.mean(changed))

    return METRICS["entity_f1"], statistics


# ------------------------------------------------------------------------------------------ suites


def suite_robustness(
    trained: Trained, suite: Suite, batch_size: int = 32
) -> Iterator[tuple[str, Robustness]]:
    """For each task of a suite, the drop of its main metric when samples or questions are disturbed.

    Texts are disturbed where that leaves the answer right (`Task.disturbed`). Every other way to ask
    is tried, and the lines of the one held out in reverse order, where it has several.

    Raises:
      UserError: as `run_suite`.
    """
    parts = (trained.run.model, trained.run.compute, trained.params, trained.tokenizer)
    generator, scorer = Generator(*parts, mesh=trained.mesh, bos=trained.bos), Scorer.of(trained)
    for name, task in zip(suite.task_names, suite.tasks, strict=True):
        samples = [sample for _, sample in evaluation_samples(task, "test")][: suite.limit or None]
        metric = metric_of(task.metrics[0], f"the metrics of {name}")

        def rows(samples: Sequence[Sample], phrasing: str, about: str, task: Task = task) -> np.ndarray:
            made = predict(
                generator, scorer, task, samples, batch_size=batch_size, seed=suite.seed, phrasing=phrasing,
                about=about,
            )  # fmt: skip
            return metric_of(task.metrics[0]).statistics(made)

        clean, drops = rows(samples, "", name), []
        for kind, what in PERTURBATIONS.items() if task.disturbed else ():
            changed = [_disturbed(task, sample, kind, suite.seed) for sample in samples]
            share = np.mean([a.values != b.values for a, b in zip(changed, samples, strict=True)])
            found = rows(changed, "", f"{name}, {kind}")
            drops.append(drop_of(kind, what.about, metric, clean, found, float(share)))
        for kind, about, phrasing in _phrasings(task):
            found = rows(samples, phrasing, f"{name}, {kind}")
            drops.append(drop_of(kind, about, metric, clean, found, 1.0))
        yield name, Robustness(metric.title, len(samples), drops)


def _disturbed(task: Task, sample: Sample, kind: str, seed: int) -> Sample:
    values = {k: perturb(v, kind, seed) if k in task.disturbed else v for k, v in sample.values.items()}
    return replace(sample, values=values)


def _phrasings(task: Task) -> Iterator[tuple[str, str, str]]:
    """Other ways to ask: a name, what it is, and the phrasing."""
    for i, phrasing in enumerate(task.prompts, 1):
        yield f"way to ask {i}", f"asked as in training: {phrasing.splitlines()[0]:.40}", phrasing
    if len(lines := task.held_out.splitlines()) > 1:
        yield "prompt order", "the lines of the question in reverse order", "\n".join(reversed(lines))
