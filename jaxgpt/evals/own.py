"""What is measured on a run's own data, by their kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxgpt.config import (
    Chat,
    Labelled,
    MaskedLM,
    Mix,
    Pairs,
    Prompts,
    Rated,
    Tagged,
    Task,
    Text,
    TransformerXL,
)
from jaxgpt.errors import require
from jaxgpt.evals.figure import Figure
from jaxgpt.evals.result import Result, Settings, named

if TYPE_CHECKING:
    from jaxgpt.evals.perplexity import Document
    from jaxgpt.sample.load import Trained


def _own_text(trained: Trained, settings: Settings) -> Result:
    """Loss as training measures it; with a stride, of documents read in sliding windows."""
    require_validation(settings)
    if settings.stride is not None:
        from jaxgpt.evals.perplexity import read_split

        path = trained.run.data.path if isinstance(trained.run.data, Text) else ""
        documents = read_split(path, settings.split, trained.tokenizer)
        return perplexity_result(
            trained, settings, documents, "validation", "validation documents, ends included"
        )
    masked = isinstance(trained.run.objective, MaskedLM)
    return _own_loss(trained, settings, "validation data" + (", hidden tokens" if masked else ""))


def _own_chat(trained: Trained, settings: Settings) -> Result:
    require_validation(settings)
    require(
        settings.stride is None, "--stride is for text, but this run reads dialogues; drop it or use --text."
    )
    return _own_loss(trained, settings, "validation dialogues, answers alone")


def _own_preferences(trained: Trained, settings: Settings) -> Result:
    require_validation(settings)
    require(
        settings.stride is None,
        "--stride is for text, but this run reads preferences; drop it or add --text.",
    )
    result = _own_loss(trained, settings, "validation preferences")
    figures = {n: f for n, f in result.figures.items() if n != "token_perplexity"}
    names = {"loss": "preference_loss", "accuracy": "preference_accuracy", "targets": "preferences"}
    return result._replace(figures={names.get(n, n): f for n, f in figures.items()})


def _own_mix(trained: Trained, settings: Settings) -> Result:
    require_validation(settings)
    require(settings.stride is None, "--stride is for text, but this run reads a mixture; add --text.")
    return _own_loss(trained, settings, "validation data, all sources")


def own_sources(trained: Trained, settings: Settings, data: Mix) -> Iterator[Result]:
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
    name = named(name, settings)
    title += f" (memory of {settings.memory} tokens)" if settings.memory is not None else ""
    return Result(name, f"The run's own {title}", {n: Figure(v) for n, v in figures.items()})


def require_validation(settings: Settings) -> None:
    """Refuse another split than that of validation."""
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
    require_validation(settings)
    require(settings.stride is None, "--stride is for text, but this run answers prompts; add --text.")
    from jaxgpt.evals.rewards import rewards_of

    figures = {name: Figure(value) for name, value in rewards_of(trained, settings.limit).items()}
    return Result(named("validation", settings), "The run's own validation prompts", figures)


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


def perplexity_result(
    trained: Trained, settings: Settings, documents: Iterable[Document], name: str, what: str
) -> Result:
    """Perplexities of documents."""
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
    return Result(named(name, settings), f"{what} ({how})", figures)
