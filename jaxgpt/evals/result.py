"""What an evaluation was asked for, what it found, and how that is printed and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxgpt.errors import NotFinite
from jaxgpt.evals.figure import Figure

if TYPE_CHECKING:
    from jaxgpt.evals.metrics import Interval
    from jaxgpt.sample.load import Trained

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


def figures_of(found: Mapping[str, Interval]) -> dict[str, Figure]:
    """Figures with intervals; a value that there is none of (NaN) as none."""

    def known(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    return {
        key: Figure(known(one.value), None, known(one.low), known(one.high)) for key, one in found.items()
    }


def named(name: str, settings: Settings) -> str:
    """A file's name, which other settings do not share."""
    extra = {"stride": settings.stride, "memory": settings.memory, "limit": settings.limit or None}
    parts = [name.replace("/", "-"), *(f"{k}-{v}" for k, v in extra.items() if v is not None)]
    return "-".join(parts)


def require_finite(result: Result) -> None:
    """Refuse a figure that is NaN or infinite."""
    for key, figure in result.figures.items():
        if not all(math.isfinite(v) for v in figure if v is not None):
            raise NotFinite(f"{result.title}: {name_of(result, key)} is")


def name_of(result: Result, key: str) -> str:
    """A figure's name in full."""
    return result.titles.get(key) or NAMES.get(key, key)


def record_of(trained: Trained, result: Result, settings: Settings) -> dict[str, Any]:
    """What RUN/eval/NAME.json holds."""
    figures = {
        key: {"name": name_of(result, key), "value": figure.value, "standard_error": figure.stderr}
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


def print_result(result: Result) -> None:
    """Print a table of the figures, and what else there is to read."""
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
        table.add_row(name_of(result, key), *cells)
    Console().print(table)
    for key, signature in result.signatures.items():
        print(f"{name_of(result, key)}: {signature}")
    if result.report:
        print(result.report)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"
