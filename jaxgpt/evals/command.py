"""`jaxgpt eval RUN`: what a trained run is worth, on its own data, on texts and on tasks.

jax is imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxgpt.alive import alive
from jaxgpt.config import (
    ONE_DEVICE,
    Mesh,
    Mix,
    Task,
    TransformerXL,
    load_run,
)
from jaxgpt.config.bounds import Bounds, Limit, Tokens, TokensOr0, bounded
from jaxgpt.config.suite import Suite
from jaxgpt.errors import UserError, require
from jaxgpt.evals.checks import (
    calibration_result,
    choice_calibration,
    chosen_suite,
    forgetting_results,
    robust_results,
    safety_results,
    suite_results,
)
from jaxgpt.evals.own import OWN_DATA, own_sources, perplexity_result
from jaxgpt.evals.result import Result, Settings, named, print_result, record_of, require_finite
from jaxgpt.files import require_writable, to_json, write_json, write_jsonl
from jaxgpt.report import run_report
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    from jaxgpt.sample.load import Trained

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


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
    ensemble: tuple[str, ...] = (),
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
      ensemble: further runs of the same labels and tokenizer, whose probabilities are averaged.
      safety: toxicity of completions, differences between groups of people, memorised training text, planted
        canaries and personal data, as RUN/eval/safety.html; exits with 5 where a figure is above its limit.
      safety_limits: JSON file of an object from names of figures to the most that passes.
      sentiment: a classifier's run, whose judgement of the compared sentences is measured by --safety too.
      calibration: calibration errors and a reliability plot of labels, or of next tokens, before and after
        the temperature that suits the validation data best; with --tasks, of multiple choice.
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
    alone = {"--calibration": calibration or fit_temperature, "--safety": safety, "--robust": robust}
    alone |= {"--forgetting": bool(forgetting)}
    chosen = [name for name, given in alone.items() if given]
    require(len(chosen) < 2, f"{' and '.join(chosen)} are measured one at a time; drop one.")
    require(bool(suite) or not against, "--against is for a suite; name one with --suite FILE.py.")
    require(not (against and chosen), f"--against has no part in {''.join(chosen)}; drop one.")
    require(safety or not (safety_limits or sentiment), "--safety-limits and --sentiment are for --safety.")
    require(
        stride is None or not (suite or chosen),
        "--stride is for perplexities of text; drop it, or the others.",
    )
    asked = chosen_suite(suite, limit, bool(text or names)) if suite else None
    trained = _load(run, checkpoint, mesh, verify, settings)
    if ensemble:
        from jaxgpt.evals.predict import ensemble as together

        trained = together(trained, [_load(one, "best", mesh, verify, settings) for one in ensemble])
    rows = batch_size or (32 if text or names or suite else trained.run.train.batch_size)
    settings = replace(settings, batch_size=rows)
    kind = f"-{checkpoint}" if checkpoint != "best" else ""
    kind += f"-ensemble-{len(ensemble) + 1}" if ensemble else ""
    part = f", limit {limit}" if limit else ""
    first = jax.process_index() == 0  # every process finds the same
    if first:
        require_writable(trained.folder / "eval")
    if calibration or fit_temperature:
        others = bool(text or suite or (names and fit_temperature))
        require(not others, "--calibration is of the run's own data or of --tasks; drop it, or the others.")
        results = (
            choice_calibration(trained, settings, names)
            if names
            else iter([calibration_result(trained, settings, fit_temperature)])
        )
    elif safety:
        others = bool(text or names or suite)
        require(not others, "--safety is by itself; drop it, or what else is to be measured.")
        results = safety_results(
            trained, settings, safety_limits, sentiment, partial(_load, mesh=mesh, verify=verify)
        )
    elif robust:
        require(not (text or names), "--robust is of the run's own data or a suite; drop --text and --tasks.")
        results = robust_results(trained, settings, asked)
    elif forgetting:
        others = bool(text or names or suite)
        require(not others, "--forgetting is by itself; drop it, or --text, --tasks and --suite.")
        results = forgetting_results(trained, settings, forgetting, partial(_load, mesh=mesh, verify=verify))
    elif asked is not None:
        results = suite_results(trained, asked, settings, against, partial(_load, mesh=mesh, verify=verify))
    else:
        results = _results(trained, settings, text, names, chat)
    while result := _next(results):
        result = result._replace(name=result.name + kind, title=result.title + part)
        require_finite(result)
        if first:
            record = record_of(trained, result, settings)
            path = trained.folder / "eval" / f"{result.name}.json"
            try:
                print_result(result) if not json else print(to_json(record, 2), flush=True)
            finally:  # shown also where it cannot be saved, saved also where it cannot be shown
                if result.predictions:
                    path.unlink(missing_ok=True)  # so that it never stands beside predictions of another
                    write_jsonl(path.with_suffix(".predictions.jsonl"), result.predictions)
                write_json(path, record)
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
            yield from own_sources(trained, settings, data)


# --------------------------------------------------------------------------------- the run's own data


# ------------------------------------------------------------------------------------ texts and tasks


def _text(trained: Trained, settings: Settings, files: tuple[str, ...]) -> Result:
    from jaxgpt.evals.perplexity import read_texts

    documents = itertools.islice(read_texts(files, trained.tokenizer, trained.bos), settings.limit or None)
    names = [Path(file).name.split(".jsonl")[0].removesuffix(".txt") for file in files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    name = "text-" + names[0] + (f"-and-{len(names) - 1}-more" if more else "")
    return perplexity_result(trained, settings, documents, name, Path(files[0]).name + more)


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
            named(f"task-{name}", settings), f"{name}, {len(asked)} records", figures, scorer.truncated
        )
        scorer.truncated = 0
    if theirs:
        from jaxgpt.evals.harness import run_lm_eval

        options: dict[str, Any] = {"batch_size": settings.batch_size, "limit": settings.limit, "chat": chat}
        for task, figures in run_lm_eval(scorer, theirs, **options).items():
            name = named(f"lm-eval-{task}" + ("-chat" if chat else ""), settings)
            title = f"{task} (lm-evaluation-harness{', chat' if chat else ''})"
            yield Result(name, title, figures, scorer.truncated)  # of all these tasks together


# --------------------------------------------------------------------------------------- what is left
