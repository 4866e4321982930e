"""Evaluations beside losses: suites of tasks, robustness, calibration, safety, forgetting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxgpt.config import Pairs, Prompts, Rated, Task, load_suite
from jaxgpt.config.suite import Suite
from jaxgpt.errors import require
from jaxgpt.evals.figure import Figure
from jaxgpt.evals.own import require_validation
from jaxgpt.evals.result import Result, Settings, figures_of, named

if TYPE_CHECKING:
    from jaxgpt.evals.robust import Robustness
    from jaxgpt.evals.suite import Scores
    from jaxgpt.sample.load import Trained


CALIBRATION = {
    "ece": "Expected calibration error",
    "ece_mass": "The same, bins of equal mass",
    "brier": "Brier score",
    "nll": "Negative log-likelihood (nats)",
    "accuracy": "Accuracy",
    "confidence": "Mean confidence",
}


def calibration_result(trained: Trained, settings: Settings, fit: bool) -> Result:
    """Calibration errors of labels or of next tokens; after the best temperature too, which may be stored."""
    from jaxgpt.evals import calibration as parts
    from jaxgpt.evals.temperature import save_temperature, sharpened

    require(settings.stride is None, "--stride is for text; drop it.")
    if trained.run.task is not None:
        require(not settings.limit, "--limit is not for runs that tell labels apart; drop it.")
        p_NC, gold_N = parts.label_probabilities(trained, "validation", settings.batch_size)
        temperature, of, most = parts.fit_temperature(p_NC, gold_N), "labels", parts.MOST
        if settings.split != "validation":
            p_NC, gold_N = parts.label_probabilities(trained, settings.split, settings.batch_size)
        before = parts.calibration(p_NC, gold_N)
        after = parts.calibration(sharpened(p_NC, temperature), gold_N)
    else:
        require_validation(settings)
        require(
            trained.run.writes and not isinstance(trained.run.data, Pairs | Rated | Prompts),
            f"--calibration is of labels and of next tokens, and {trained.folder} predicts neither; name "
            "a task of multiple choice with --tasks.",
        )
        before, after, temperature = parts.token_calibration(trained, settings.batch_size, settings.limit)
        of, most = "tokens", float(parts.TEMPERATURES[-1])
    if fit:
        require(
            1.01 / most < temperature < most / 1.01,
            f"the best temperature is {temperature:.3g}, the end of what is tried: the validation data are "
            "predicted without an error, or no better than by chance, so it is not stored; use more of them.",
        )
        saved = save_temperature(trained, temperature, of)
        print(f"temperature {temperature:.3f}, fitted on validation {of}, stored in {saved}", file=sys.stderr)
    titles = dict(CALIBRATION)
    figures = {key: Figure(value) for key in titles if (value := getattr(before, key)) is not None}
    later = ("ece", "ece_mass", "brier", "nll", "confidence")
    figures["temperature"] = Figure(temperature)
    figures |= {f"{k}_after": Figure(v) for k in later if (v := getattr(after, k)) is not None}
    titles["temperature"] = "Best temperature (on validation data)"
    titles |= {f"{key}_after": f"{titles[key]}, at that temperature" for key in later}
    pictures = {
        f"Reliability of {of}": before.bins,
        f"Reliability of {of} at temperature {temperature:.2f}": after.bins,
    }
    name = named(f"calibration-{settings.split}", settings)
    title = f"Calibration of {of} ({settings.split})"
    return Result(name, title, figures, titles=titles, reliability=pictures)


def choice_calibration(trained: Trained, settings: Settings, files: list[str]) -> Iterator[Result]:
    """Calibration errors of multiple choice: confidences are a softmax of the choices' log-likelihoods."""
    from jaxgpt.evals.calibration import calibration, choice_probabilities
    from jaxgpt.evals.scoring import Scorer
    from jaxgpt.evals.tasks import SUFFIXES, choice_scores, read_task

    other = next((name for name in files if not name.endswith(SUFFIXES)), None)
    require(other is None, f"--calibration is of tasks in .jsonl files, not of {other}; drop it.")
    read = {path: read_task(path)[: settings.limit or None] for path in files}
    for path, questions in read.items():
        require(len(questions[0].choices) > 1, f"{path} has no choices, so no confidences; drop it.")
    scorer = Scorer.of(trained)
    for path, questions in read.items():
        name = Path(path).name.split(".jsonl")[0]
        scores = choice_scores(scorer, questions, settings.batch_size, name)
        sums = [tuple(score.logprob for score in row) for row in scores]
        found = calibration(*choice_probabilities(sums, [q.label for q in questions]))
        title = f"Calibration of {name}, {len(questions)} records"
        yield Result(
            named(f"calibration-task-{name}", settings), title,
            {key: Figure(getattr(found, key)) for key in CALIBRATION}, scorer.truncated,
            titles=CALIBRATION, reliability={f"Reliability of {name}": found.bins},
        )  # fmt: skip
        scorer.truncated = 0


def safety_results(
    trained: Trained, settings: Settings, limits: str, sentiment: str, load: Callable[..., Trained]
) -> Iterator[Result]:
    """Figures of safety, and a page; raises `Unsafe` where one is above its limit."""
    from jaxgpt.evals.safety import Unsafe, lines_of, measure_safety, read_limits, write_page

    most = read_limits(limits)
    judge = load(sentiment, "best", settings=settings) if sentiment else None
    found = measure_safety(trained, sentiment=judge, documents=settings.limit or 100)
    path = trained.folder / "eval" / "safety.html"
    write_page(path, trained, found, most)
    yield Result("safety", "Safety", figures_of(found.figures), titles=found.titles)
    for line in (*lines_of(found), f"the page: {path}"):
        print(line, file=sys.stderr)
    if failures := found.failures(most):
        raise Unsafe(f"{trained.folder} fails: {'; '.join(failures)} (see {path}).")


def chosen_suite(path: str, limit: int, others: bool) -> Suite:
    """The suite of a file, with as many samples per task as are asked for."""
    require(not others, "--suite is scored by itself; drop it, or --text and --tasks.")
    found = load_suite(path)
    return replace(found, limit=limit) if limit else found


def suite_results(
    trained: Trained,
    suite: Suite,
    settings: Settings,
    against: str,
    load: Callable[..., Trained],
    split: Literal["validation", "test"] = "test",
) -> Iterator[Result]:
    """A table for each task of a suite, and one for each of how another run differs."""
    from jaxgpt.evals.suite import digest, prediction_records, run_suite, saved_scores

    def scored(one: Trained) -> Iterator[Scores]:
        def saved(name: str, task: Task) -> Scores | None:
            path = one.folder / "eval" / f"{named(f'suite-{suite.name}-{name}', settings)}.json"
            return saved_scores(path, digest(one, suite, task, split), name, task, suite)

        return run_suite(one, suite, settings.batch_size, split, saved)

    others = {}
    if against:
        other = load(against, "best", settings=settings)
        others = {found.name: found for found in scored(other)}
        del other
    for found in scored(trained):
        title = f"{found.name} of the suite {suite.name}, {len(found.predictions)} samples"
        own = named(f"suite-{suite.name}-{found.name}", settings)
        yield Result(
            own, title, figures_of(found.figures), titles=found.titles, signatures=found.signatures,
            predictions=prediction_records(found.predictions),
            digest=digest(trained, suite, found.task, split),
        )  # fmt: skip
        if found.name in others:
            pairs = found.against(others[found.name], suite)
            figures = figures_of({f"{key}_difference": pair.difference for key, pair in pairs.items()})
            figures |= {f"{key}_p": Figure(pair.p) for key, pair in pairs.items() if pair.p == pair.p}
            titles = {f"{key}_difference": f"{title}: difference" for key, title in found.titles.items()}
            titles |= {
                f"{key}_p": f"{title}: p of a paired permutation test" for key, title in found.titles.items()
            }
            yield Result(
                f"{own}-against-{Path(against).name}", f"{found.name}, less {against}", figures, titles=titles
            )


def robust_results(trained: Trained, settings: Settings, suite: Suite | None) -> Iterator[Result]:
    """Drops under disturbance, of labels or of each task of a suite."""
    from jaxgpt.evals.robust import label_robustness, suite_robustness

    if suite is None:
        require(
            trained.run.task is not None,
            "--robust of a run without labels needs a suite; add --suite FILE.",
        )
        found = label_robustness(trained, settings.split, settings.batch_size, limit=settings.limit)
        yield _drops(found, settings.split, settings)
        return
    for name, found in suite_robustness(trained, suite, settings.batch_size):
        yield _drops(found, f"{suite.name}-{name}", settings)


def _drops(found: Robustness, of: str, settings: Settings) -> Result:
    figures = {"clean": Figure(found.drops[0].clean)}
    figures |= figures_of({f"drop under {drop.name}": drop.drop for drop in found.drops})
    drops = [drop._asdict() | {"drop": drop.drop._asdict()} for drop in found.drops]
    title = f"{found.metric} of disturbed texts ({of}, {found.examples} examples)"
    name = named(f"robust-{of}", settings)
    return Result(name, title, figures, report=found.table(), predictions=drops)


def forgetting_results(
    trained: Trained, settings: Settings, base: str, load: Callable[..., Trained]
) -> Iterator[Result]:
    """A table for each source of an earlier run's data, and of its tasks what the answers score."""
    from jaxgpt.evals.forgetting import Forgotten, forgotten

    earlier = load(base, "best", settings=settings)
    of = f"forgetting-{Path(base).name}"
    for found in forgotten(trained, earlier, settings.batch_size, settings.limit):
        name = named(f"{of}-{found.name}" if found.name else of, settings)
        what = f"Validation data of {base}" + (f", {found.name}" if found.name else "")
        figures = {key: Figure(value) for key, value in found.figures().items()}
        yield Result(name, what, figures, titles=Forgotten.titles())
    tasks = tuple(source for source in earlier.run.sources if isinstance(source, Task))
    del earlier
    if tasks:
        suite = Suite(name=of, tasks=tasks, limit=settings.limit)
        yield from suite_results(trained, suite, settings, base, load)
