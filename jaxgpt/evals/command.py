"""`jaxgpt eval RUN`: what a trained run is worth, on its own data, on texts and on tasks.

jax is imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jaxgpt.alive import alive
from jaxgpt.config import (
    ONE_DEVICE,
    Chat,
    Labelled,
    MaskedLM,
    Mesh,
    Mix,
    Pairs,
    Prompts,
    Rated,
    Tagged,
    Task,
    Text,
    TransformerXL,
    load_run,
    load_suite,
)
from jaxgpt.config.bounds import Bounds, Limit, Tokens, TokensOr0, bounded
from jaxgpt.config.suite import Suite
from jaxgpt.errors import NotFinite, UserError, require
from jaxgpt.evals.figure import Figure
from jaxgpt.files import require_writable, to_json, write_json, write_jsonl
from jaxgpt.report import run_report
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    from jaxgpt.evals.metrics import Interval
    from jaxgpt.evals.perplexity import Document
    from jaxgpt.evals.robust import Robustness
    from jaxgpt.evals.suite import Scores
    from jaxgpt.sample.load import Trained

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]

NAMES = {
    "loss": "Loss (nats per token)",
    "accuracy": "Accuracy of the likeliest token",
    "token_perplexity": "Perplexity of tokens (of this tokenizer alone)",
    "word_perplexity": "Perplexity of whitespace-separated words",
    "bits_per_byte": "Bits per byte of UTF-8",
    "bits_per_character": "Bits per character",
    "preference_loss": "Loss (nats per preference)",
    "reward_chosen": "Reward of the chosen side (of good completions)",
    "reward_rejected": "Reward of the rejected side (of bad completions)",
    "margin": "Reward of the chosen side less that of the rejected one",
    "preference_accuracy": "Share of preferences that rewards agree with",
    "length_chosen": "Tokens of the chosen side",
    "length_rejected": "Tokens of the rejected side",
    "chosen_nll": "Loss of the chosen side (nats per token)",
    "kl": "Divergence from the reference (estimate, in nats)",
    "preferences": "Preferences",
    "reward": "Mean reward of completions",
    "reward_std": "Standard deviation of the rewards",
    "completion_length": "Tokens of a completion",
    "stopped": "Share of completions that end by themselves",
    "targets": "Predicted tokens",
    "tokens": "Predicted tokens",
    "words": "Words",
    "bytes": "Bytes",
    "characters": "Characters",
    "last_word_accuracy": "Accuracy of the last word",
    "last_word_perplexity": "Perplexity of the last word",
    **{
        f"{mode}_{average}_{key}": f"{name} of entities, {mode} mode, {average} average"
        for mode in ("strict", "default")
        for average in ("micro", "macro")
        for key, name in (("precision", "Precision"), ("recall", "Recall"), ("f1-score", "F1"))
    },
    "token_accuracy": "Accuracy of tags, O among them",
    "label_accuracy": "Accuracy of labels",
    "macro_f1-score": "F1 of labels, macro average",
    "acc": "Accuracy by log-likelihood",
    "acc_norm": "Accuracy by log-likelihood a character",
    "acc_bytes": "Accuracy by log-likelihood a byte",
    "acc_tokens": "Accuracy by log-likelihood per token",
}
"""Every figure's name in full; what is not here, as the metrics of lm-evaluation-harness, names itself."""


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for; see `evaluate`."""

    split: Literal["validation", "test"] = "validation"
    stride: int | None = None
    memory: int | None = None
    limit: int = 0
    batch_size: int = 0


class Result(NamedTuple):
    """One table.

    Attributes:
      name: of its file.
      title: what was measured and how.
      figures: by their keys in `NAMES`, in order.
      truncated: contexts that lost their beginning, being longer than the model's.
      report: more of it as text, in lines.
      confusion: labels and their counts, rows gold and columns predicted.
      predictions: of each example, as JSON.
      classes: precision, recall, f1 and support of each label.
      titles: names in full of figures that `NAMES` has not.
      signatures: what a published figure must name beside its metric.
      reliability: bins of confidence by what they are of, see `report.reliability`.
      digest: of what the predictions depend on, where they can be used again.
    """

    name: str
    title: str
    figures: Mapping[str, Figure]
    truncated: int = 0
    report: str = ""
    confusion: tuple[list[str], list[list[int]]] | None = None
    predictions: Sequence[dict[str, Any]] = ()
    classes: Sequence[dict[str, Any]] = ()
    titles: Mapping[str, str] = {}
    signatures: Mapping[str, str] = {}
    reliability: Mapping[str, Sequence[Sequence[float]]] = {}
    digest: str = ""


@bounded
def evaluate(
    run: Folder,
    *,
    split: Literal["validation", "test"] = "validation",
    text: tuple[str, ...] = (),
    stride: Tokens | None = None,
    memory: TokensOr0 | None = None,
    tasks: str = "",
    chat: Switch = False,
    suite: str = "",
    against: str = "",
    robust: Switch = False,
    safety: Switch = False,
    safety_limits: str = "",
    sentiment: str = "",
    calibration: Switch = False,
    fit_temperature: Switch = False,
    forgetting: str = "",
    checkpoint: str = "best",
    verify: Verify = True,
    limit: Limit = 0,
    batch_size: Annotated[int, Bounds(0, 2**20)] = 0,
    mesh: Mesh = ONE_DEVICE,
    json: Switch = False,
) -> None:
    """Evaluate a trained run: on its own validation data, on raw text, or on tasks.

    Without --text and --tasks, the run's own data are used, as during training. The results are printed,
    saved in RUN/eval and shown in RUN/report.html.

    Args:
      run: folder of the run.
      split: which part of the run's own data.
      text: files of raw text (.jsonl and .parquet hold one document per record), for perplexities of tokens
        and words, and bits per byte and character.
      stride: number of tokens by which the window moves: each token then sees at least context - stride + 1
        before it; 1 is exact and slow. Without it the windows do not overlap.
      memory: memory length of a Transformer-XL, instead of its eval_memory.
      tasks: comma-separated: .jsonl files (`text` for last words; `context`, `choices` and
        `label` for multiple choice), names of tasks of lm-evaluation-harness, or paths of YAML
        files that describe one.
      chat: ask the tasks of lm-evaluation-harness as a user's turns.
      suite: file with `def config() -> Suite`: tasks on which the run's answers are scored, with intervals;
        every prediction is saved (docs/tasks.md).
      against: another run, which is scored on the same suite: differences with intervals and p.
      safety: toxicity of completions, differences between groups of people, memorised training text, planted
        canaries and personal data, as RUN/eval/safety.html; exits with 4 where a figure is above its limit.
      safety_limits: JSON file of an object from names of figures to the most that passes.
      sentiment: a classifier's run, whose judgement of the compared sentences is measured by --safety too.
      calibration: calibration errors and a reliability plot of labels, or of next tokens, before and after
        the temperature that suits the validation data best.
      fit_temperature: the same, and store that temperature with the run, for the confidences of `predict`.
      robust: what is lost under typos, other case, dropped or swapped words and sentences put before the
        text: of a tagger or classifier on its own data, of answers to a suite, also when asked otherwise.
      forgetting: an earlier run, as that named by init_from: what of its validation data and tasks was lost.
      checkpoint: `best` on validation data, `newest`, or a step number.
      limit: number of records per task, documents of text or batches of the run's own data; 0 means all.
      batch_size: rows per batch; 0 means that of training for the run's own data (what masked LM hides
        depends on it), else 32.
      mesh: devices to spread the model over.
      json: print one JSON object per table instead.

    Raises:
      UserError: a bad setting, data that are not there, or a run that they do not suit.
    """
    import jax

    settings = Settings(split, stride, memory, limit, batch_size)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    _check(settings, bool(text), names)
    require(bool(suite) or not against, "--against is for a suite; name one with --suite FILE.py.")
    asked = _suite(suite, limit, bool(text or names)) if suite else None
    trained = _load(run, checkpoint, mesh, verify, settings)
    rows = batch_size or (32 if text or names or suite else trained.run.train.batch_size)
    settings = replace(settings, batch_size=rows)
    kind = f"-{checkpoint}" if checkpoint != "best" else ""
    part = f", limit {limit}" if limit else ""
    first = jax.process_index() == 0  # every process finds the same
    if first:
        require_writable(trained.folder / "eval")
    if calibration or fit_temperature:
        others = bool(text or names or suite or robust)
        require(
            not others, "--calibration is of the run's own data; drop it, or what else is to be measured."
        )
        results = iter([_calibration(trained, settings, fit_temperature)])
    elif safety:
        others = bool(text or names or suite or robust)
        require(not others, "--safety is by itself; drop it, or what else is to be measured.")
        results = _safety(
            trained, settings, safety_limits, sentiment, partial(_load, mesh=mesh, verify=verify)
        )
    elif robust:
        require(not (text or names), "--robust is of the run's own data or a suite; drop --text and --tasks.")
        results = _robust(trained, settings, asked)
    elif forgetting:
        others = bool(text or names or suite)
        require(not others, "--forgetting is by itself; drop it, or --text, --tasks and --suite.")
        results = _forgetting(trained, settings, forgetting, partial(_load, mesh=mesh, verify=verify))
    elif asked is not None:
        results = suite_results(trained, asked, settings, against, partial(_load, mesh=mesh, verify=verify))
    else:
        results = _results(trained, settings, text, names, chat)
    while result := _next(results):
        result = result._replace(name=result.name + kind, title=result.title + part)
        _require_finite(result)
        if first:
            record = _record(trained, result, settings)
            path = trained.folder / "eval" / f"{result.name}.json"
            try:
                _print(result) if not json else print(to_json(record, 2), flush=True)
            finally:  # shown also where it cannot be saved, saved also where it cannot be shown
                write_json(path, record)
                if result.predictions:
                    write_jsonl(path.with_suffix(".predictions.jsonl"), result.predictions)
            print(f"{result.title}: saved as {path}", file=sys.stderr)
            if (trained.folder / "metrics.jsonl").is_file():  # trained here: the run has a page of its own
                run_report(trained.folder)


def _next(results: Iterator[Result]) -> Result | None:
    with alive("evaluating"):
        return next(results, None)


def _check(settings: Settings, text: bool, names: list[str]) -> None:
    require(
        settings.stride is None or settings.memory is None,
        "--stride and --memory are two ways to give a token what is before it; set one of them.",
    )
    require(
        not names or text or (settings.stride is None and settings.memory is None),
        "--stride and --memory are for text; drop them, or name texts with --text.",
    )
    require(
        settings.split == "validation" or not (text or names),
        "--split is of the run's own data; drop it, or --text and --tasks.",
    )


def _load(run: str, checkpoint: str, mesh: Mesh, verify: bool, settings: Settings) -> Trained:
    load_run(run)  # a wrong name needs no jax to be told
    from jaxgpt.sample.load import load_trained

    trained = load_trained(run, which=checkpoint, mesh=mesh, verify=verify)
    if settings.memory is None:
        return trained
    model = trained.run.model
    require(
        isinstance(model, TransformerXL),
        f"--memory is {settings.memory} but a {type(model).__name__} carries none; drop it, or use --stride.",
    )
    assert isinstance(model, TransformerXL)
    return trained._replace(run=replace(trained.run, model=replace(model, eval_memory=settings.memory)))


def _results(
    trained: Trained, settings: Settings, text: tuple[str, ...], names: list[str], chat: bool
) -> Iterator[Result]:
    if text:
        yield _text(trained, settings, text)
    if names:
        yield from _tasks(trained, settings, names, chat)
    if not text and not names:
        data = trained.run.data
        kind = Task if isinstance(data, Task) else type(data)
        if kind not in OWN_DATA:
            raise UserError(
                f"`jaxgpt eval` has no report for {type(data).__name__} data; "
                f"it has for {', '.join(kind.__name__ for kind in OWN_DATA)}."
            )
        yield OWN_DATA[kind](trained, settings)
        if trained.run.tasks and trained.run.writes and settings.stride is None:
            own = trained.run.tasks
            suite = Suite(name="own", tasks=tuple(own.values()), names=tuple(own), limit=settings.limit)
            yield from suite_results(trained, suite, settings, "", _load, "validation")
        if isinstance(data, Mix):
            yield from _own_sources(trained, settings, data)


# --------------------------------------------------------------------------------- the run's own data


def _own_text(trained: Trained, settings: Settings) -> Result:
    """Loss as training measures it; with a stride, of documents read in sliding windows."""
    _no_test(settings)
    if settings.stride is not None:
        from jaxgpt.evals.perplexity import read_split

        path = trained.run.data.path if isinstance(trained.run.data, Text) else ""
        documents = read_split(path, settings.split, trained.tokenizer)
        return _perplexity(trained, settings, documents, "validation", "validation documents, ends included")
    masked = isinstance(trained.run.objective, MaskedLM)
    return _own_loss(trained, settings, "validation data" + (", hidden tokens" if masked else ""))


def _own_chat(trained: Trained, settings: Settings) -> Result:
    _no_test(settings)
    require(
        settings.stride is None, "--stride is for text, but this run reads dialogues; drop it or use --text."
    )
    return _own_loss(trained, settings, "validation dialogues, answers alone")


def _own_preferences(trained: Trained, settings: Settings) -> Result:
    _no_test(settings)
    require(
        settings.stride is None,
        "--stride is for text, but this run reads preferences; drop it or add --text.",
    )
    result = _own_loss(trained, settings, "validation preferences")
    figures = {n: f for n, f in result.figures.items() if n != "token_perplexity"}
    names = {"loss": "preference_loss", "accuracy": "preference_accuracy", "targets": "preferences"}
    return result._replace(figures={names.get(n, n): f for n, f in figures.items()})


def _own_mix(trained: Trained, settings: Settings) -> Result:
    _no_test(settings)
    require(settings.stride is None, "--stride is for text, but this run reads a mixture; add --text.")
    return _own_loss(trained, settings, "validation data, all sources")


def _own_sources(trained: Trained, settings: Settings, data: Mix) -> Iterator[Result]:
    """A table for each source of a mixture."""
    length = data.length or trained.run.row
    for name, source in zip(data.source_names, data.sources, strict=True):
        alone = trained._replace(run=replace(trained.run, data=replace(source, length=length)))
        yield _own_loss(alone, settings, f"validation data of {name}", f"validation-{name}")


def _own_loss(trained: Trained, settings: Settings, title: str, name: str = "validation") -> Result:
    from jaxgpt.evals.loss import loss_of

    found = loss_of(trained, batch_size=settings.batch_size, batches=settings.limit)
    found["targets"] = round(found["targets"])
    figures = {"loss": found["loss"], "token_perplexity": math.exp(min(found["loss"], 100.0))} | found
    name = _named(name, settings)
    title += f" (memory of {settings.memory} tokens)" if settings.memory is not None else ""
    return Result(name, f"The run's own {title}", {n: Figure(v) for n, v in figures.items()})


def _no_test(settings: Settings) -> None:
    require(
        settings.split == "validation",
        f"--split is {settings.split!r} but this run's data have only a validation split; "
        "name other texts with --text.",
    )


def _own_labels(trained: Trained, settings: Settings) -> Result:
    require(
        settings.stride is None and not settings.limit,
        "--stride and --limit are for text and tasks, but this run tells labels apart; drop them.",
    )
    from jaxgpt.evals.labels import label_report

    found = label_report(trained, settings.split, settings.batch_size)
    figures = {name: Figure(value) for name, value in found.figures.items()}
    title = f"The run's own {settings.split} labels"
    confusion = (list(found.labels), found.counts.tolist())
    more: dict[str, Any] = {"report": found.text, "confusion": confusion, "predictions": found.predictions}
    more["classes"] = found.classes
    return Result(settings.split, title, figures, **more)


def _own_prompts(trained: Trained, settings: Settings) -> Result:
    _no_test(settings)
    require(settings.stride is None, "--stride is for text, but this run answers prompts; add --text.")
    from jaxgpt.evals.rewards import rewards_of

    figures = {name: Figure(value) for name, value in rewards_of(trained, settings.limit).items()}
    return Result(_named("validation", settings), "The run's own validation prompts", figures)


def _calibration(trained: Trained, settings: Settings, fit: bool) -> Result:
    """Calibration errors of labels or of next tokens; after the best temperature too, which may be stored."""
    from jaxgpt.evals import calibration as parts
    from jaxgpt.evals.temperature import save_temperature, sharpened

    if trained.run.task is not None:
        p_NC, gold_N = parts.label_probabilities(trained, "validation", settings.batch_size)
        temperature, of = parts.fit_temperature(p_NC, gold_N), "labels"
        if settings.split != "validation":
            p_NC, gold_N = parts.label_probabilities(trained, settings.split, settings.batch_size)
        before = parts.calibration(p_NC, gold_N)
        after = parts.calibration(sharpened(p_NC, temperature), gold_N)
    else:
        _no_test(settings)
        require(
            trained.run.writes,
            f"--calibration is of labels and of next tokens, and {trained.folder} predicts neither.",
        )
        before, after, temperature = parts.token_calibration(trained, settings.batch_size, settings.limit)
        of = "tokens"
    if fit:
        saved = save_temperature(trained, temperature, of)
        print(f"temperature {temperature:.3f}, fitted on validation {of}, stored in {saved}", file=sys.stderr)
    titles = {"ece": "Expected calibration error", "ece_mass": "The same, bins of equal mass"}
    titles |= {"brier": "Brier score", "nll": "Negative log-likelihood (nats)"}
    titles |= {"accuracy": "Accuracy", "confidence": "Mean confidence"}
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
    name = _named(f"calibration-{settings.split}", settings)
    title = f"Calibration of {of} ({settings.split})"
    return Result(name, title, figures, titles=titles, reliability=pictures)


def _safety(
    trained: Trained, settings: Settings, limits: str, sentiment: str, load: Callable[..., Trained]
) -> Iterator[Result]:
    from jaxgpt.evals.safety import Unsafe, lines_of, measure_safety, read_limits, write_page

    most = read_limits(limits)
    judge = load(sentiment, "best", settings=settings) if sentiment else None
    found = measure_safety(trained, sentiment=judge, documents=settings.limit or 100)
    path = trained.folder / "eval" / "safety.html"
    write_page(path, trained, found, most)
    yield Result("safety", "Safety", _figures(found.figures), titles=found.titles)
    for line in (*lines_of(found), f"the page: {path}"):
        print(line, file=sys.stderr)
    if failures := found.failures(most):
        raise Unsafe(f"{trained.folder} fails: {'; '.join(failures)} (see {path}).")


def _suite(path: str, limit: int, others: bool) -> Suite:
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
        for name, task in zip(suite.task_names, suite.tasks, strict=True):
            path = one.folder / "eval" / f"{_named(f'suite-{suite.name}-{name}', settings)}.json"
            alone = replace(suite, tasks=(task,), names=(name,))
            known = saved_scores(path, digest(one, suite, task, split), name, task, suite)
            yield known or next(run_suite(one, alone, settings.batch_size, split))

    others = {}
    if against:
        other = load(against, "best", settings=settings)
        others = {found.name: found for found in scored(other)}
        del other
    for found in scored(trained):
        title = f"{found.name} of the suite {suite.name}, {len(found.predictions)} samples"
        own = _named(f"suite-{suite.name}-{found.name}", settings)
        yield Result(
            own, title, _figures(found.figures), titles=found.titles, signatures=found.signatures,
            predictions=prediction_records(found.predictions),
            digest=digest(trained, suite, found.task, split),
        )  # fmt: skip
        if found.name in others:
            pairs = found.against(others[found.name], suite)
            figures = _figures({f"{key}_difference": pair.difference for key, pair in pairs.items()})
            figures |= {f"{key}_p": Figure(pair.p) for key, pair in pairs.items() if pair.p == pair.p}
            titles = {f"{key}_difference": f"{title}: difference" for key, title in found.titles.items()}
            titles |= {
                f"{key}_p": f"{title}: p of a paired permutation test" for key, title in found.titles.items()
            }
            yield Result(
                f"{own}-against-{Path(against).name}", f"{found.name}, less {against}", figures, titles=titles
            )


def _figures(found: Mapping[str, Interval]) -> dict[str, Figure]:
    """Figures with intervals; a value that there is none of (NaN) as none."""

    def known(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    return {
        key: Figure(known(one.value), None, known(one.low), known(one.high)) for key, one in found.items()
    }


def _robust(trained: Trained, settings: Settings, suite: Suite | None) -> Iterator[Result]:
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
    figures |= _figures({f"drop under {drop.name}": drop.drop for drop in found.drops})
    drops = [drop._asdict() | {"drop": drop.drop._asdict()} for drop in found.drops]
    title = f"{found.metric} of disturbed texts ({of}, {found.examples} examples)"
    name = _named(f"robust-{of}", settings)
    return Result(name, title, figures, report=found.table(), predictions=drops)


def _forgetting(
    trained: Trained, settings: Settings, base: str, load: Callable[..., Trained]
) -> Iterator[Result]:
    """A table for each source of an earlier run's data, and of its tasks what the answers score."""
    from jaxgpt.evals.forgetting import Forgotten, forgotten

    earlier = load(base, "best", settings=settings)
    of = f"forgetting-{Path(base).name}"
    for found in forgotten(trained, earlier, settings.batch_size, settings.limit):
        name = _named(f"{of}-{found.name}" if found.name else of, settings)
        what = f"Validation data of {base}" + (f", {found.name}" if found.name else "")
        figures = {key: Figure(value) for key, value in found.figures().items()}
        yield Result(name, what, figures, titles=Forgotten.titles())
    tasks = tuple(source for source in earlier.run.sources if isinstance(source, Task))
    del earlier
    if tasks:
        suite = Suite(name=of, tasks=tasks, limit=settings.limit)
        yield from suite_results(trained, suite, settings, base, load)


OWN_DATA: dict[type, Callable[[Trained, Settings], Result]] = {
    Text: _own_text,
    Chat: _own_chat,
    Task: _own_chat,
    Prompts: _own_prompts,
    Pairs: _own_preferences,
    Rated: _own_preferences,
    Mix: _own_mix,
    Tagged: _own_labels,
    Labelled: _own_labels,
}
"""What is measured on a run's own data, by the class of their config."""


# ------------------------------------------------------------------------------------ texts and tasks


def _text(trained: Trained, settings: Settings, files: tuple[str, ...]) -> Result:
    from jaxgpt.evals.perplexity import read_texts

    documents = itertools.islice(read_texts(files, trained.tokenizer, trained.bos), settings.limit or None)
    names = [Path(file).name.split(".jsonl")[0].removesuffix(".txt") for file in files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    name = "text-" + names[0] + (f"-and-{len(names) - 1}-more" if more else "")
    return _perplexity(trained, settings, documents, name, Path(files[0]).name + more)


def _perplexity(
    trained: Trained, settings: Settings, documents: Iterable[Document], name: str, what: str
) -> Result:
    from jaxgpt.evals import perplexity
    from jaxgpt.evals.scoring import Scorer

    scorer, stride, model = Scorer.of(trained), settings.stride, trained.run.model
    if isinstance(model, TransformerXL) and stride is None:
        total = perplexity.recurrent(scorer, documents, trained.run.length, settings.batch_size)
        kept = model.memory if model.eval_memory is None else model.eval_memory
        how = f"memory of {kept} tokens"
    else:
        total = perplexity.sliding(scorer, documents, stride or 0, settings.batch_size)
        how = f"stride {stride}" if stride else "disjoint windows"
        how += f", context {model.context}"
    figures = {n: Figure(v) for n, v in total.figures().items()}
    return Result(_named(name, settings), f"{what} ({how})", figures)


def _tasks(trained: Trained, settings: Settings, names: list[str], chat: bool) -> Iterator[Result]:
    from jaxgpt.evals.scoring import Scorer
    from jaxgpt.evals.tasks import SUFFIXES, read_task, run_task

    ours = {name: read_task(name) for name in names if name.endswith(SUFFIXES)}  # all before any is run
    theirs = [name for name in names if name not in ours]
    scorer, settings = Scorer.of(trained), replace(settings, stride=None, memory=None)  # which are for text
    for path, questions in ours.items():
        asked, name = questions[: settings.limit or None], Path(path).name.split(".jsonl")[0]
        figures = run_task(scorer, asked, settings.batch_size, name)
        if len(questions[0].choices) == 1:
            figures = {f"last_word_{key}": figure for key, figure in figures.items()}
        yield Result(
            _named(f"task-{name}", settings), f"{name}, {len(asked)} records", figures, scorer.truncated
        )
        scorer.truncated = 0
    if theirs:
        from jaxgpt.evals.harness import run_lm_eval

        options: dict[str, Any] = {"batch_size": settings.batch_size, "limit": settings.limit, "chat": chat}
        for task, figures in run_lm_eval(scorer, theirs, **options).items():
            name = _named(f"lm-eval-{task}" + ("-chat" if chat else ""), settings)
            title = f"{task} (lm-evaluation-harness{', chat' if chat else ''})"
            yield Result(name, title, figures, scorer.truncated)  # of all these tasks together


# --------------------------------------------------------------------------------------- what is left


def _named(name: str, settings: Settings) -> str:
    """A file's name, which other settings do not share."""
    extra = {"stride": settings.stride, "memory": settings.memory, "limit": settings.limit or None}
    parts = [name.replace("/", "-"), *(f"{k}-{v}" for k, v in extra.items() if v is not None)]
    return "-".join(parts)


def _require_finite(result: Result) -> None:
    for key, figure in result.figures.items():
        if not all(math.isfinite(v) for v in figure if v is not None):
            raise NotFinite(f"{result.title}: {_name(result, key)} is")


def _name(result: Result, key: str) -> str:
    """A figure's name in full."""
    return result.titles.get(key) or NAMES.get(key, key)


def _record(trained: Trained, result: Result, settings: Settings) -> dict[str, Any]:
    """What RUN/eval/NAME.json holds."""
    figures = {
        key: {"name": _name(result, key), "value": figure.value, "standard_error": figure.stderr}
        | ({} if figure.low is None else {"interval": [figure.low, figure.high]})
        | ({"signature": result.signatures[key]} if result.signatures.get(key) else {})
        for key, figure in result.figures.items()
    }
    made = {"step": trained.step, "settings": asdict(settings), "truncated_contexts": result.truncated}
    more: dict[str, Any] = {"digest": result.digest} if result.digest else {}
    if result.reliability:
        more["reliability"] = result.reliability
    if result.report:
        more["report"] = result.report
    if result.confusion:
        more |= {"confusion": result.confusion, "classes": list(result.classes)}
    return {"title": result.title, **made, "figures": figures, **more}


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    errors = any(figure.stderr is not None for figure in result.figures.values())
    ends = any(figure.low is not None for figure in result.figures.values())
    columns = [*(["standard error"] if errors else []), *(["95 % interval"] if ends else [])]
    table = Table("", "value", *columns, title=result.title)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, figure in result.figures.items():
        cells = [_number(figure.value), *([_number(figure.stderr)] if errors else [])]
        if ends:
            cells.append("–" if figure.low is None else f"{_number(figure.low)} to {_number(figure.high)}")
        table.add_row(_name(result, key), *cells)
    Console().print(table)
    for key, signature in result.signatures.items():
        print(f"{_name(result, key)}: {signature}")
    if result.report:
        print(result.report)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"
