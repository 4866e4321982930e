"""Metrics of written text, by the libraries that define them: BLEU, chrF, ROUGE; and of its variety."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.evals.metrics.base import Metric, Prediction, mean_of, ratio

INSTALL = "which is not installed; run `pip install 'jaxgpt[eval]'`."
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+|[^\w\s]|_", re.UNICODE)


def tokens(text: str) -> list[str]:
    """Words, marks, and Chinese characters one by one."""
    return _WORD.findall(text)


# ------------------------------------------------------------------------------------------ sacreBLEU


@lru_cache
def _sacrebleu(name: str, language: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError(f"BLEU and chrF are computed by sacrebleu, {INSTALL}") from None
    return BLEU(tokenize="zh" if language == "zh" else "13a") if name == "bleu" else CHRF()


def _sacre(name: str, title: str) -> Metric:
    def statistics(predictions: Sequence[Prediction]) -> np.ndarray:
        library = _sacrebleu(name, predictions[0].language)
        most = max(len(p.sample.answers) for p in predictions)
        streams = [  # a missing reference is None there
            [p.sample.answers[i] if i < len(p.sample.answers) else None for p in predictions]
            for i in range(most)
        ]
        library.num_refs = most if most == min(len(p.sample.answers) for p in predictions) else -1
        found = library._extract_corpus_statistics([p.answer for p in predictions], streams)
        return np.asarray(found, np.float64)

    def score(sums: np.ndarray) -> float:
        library = _sacrebleu(name, "en")  # the language plays no part in sums
        return library._compute_score_from_stats(sums.astype(int).tolist()).score

    def signature(language: str) -> str:
        library = _sacrebleu(name, language)
        library.num_refs = library.num_refs or -1
        return str(library.get_signature())

    return Metric(title, statistics, score, signature=signature)


# -------------------------------------------------------------------------------------------- ROUGE


class _Characters:
    """What ROUGE compares: words in lower case, and of Chinese its characters."""

    def tokenize(self, text: str) -> list[str]:
        return [token for token in tokens(text.lower()) if token[0].isalnum()]


@lru_cache
def _rouge(name: str, language: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(f"ROUGE is computed by rouge-score, {INSTALL}") from None
    own = {"tokenizer": _Characters()} if language == "zh" else {"use_stemmer": True}
    return RougeScorer([name], **own)


def _rouge_metric(name: str) -> Metric:
    def value(p: Prediction) -> float:
        if not p.sample.answers:
            return math.nan
        scorer = _rouge(name, p.language)
        return 100 * scorer.score_multi(list(p.sample.answers), p.answer)[name].fmeasure

    def signature(language: str) -> str:
        from importlib.metadata import version

        how = "characters" if language == "zh" else "stemmed words"
        return f"{name}|f-measure|{how}|best reference|rouge-score {version('rouge-score')}"

    return Metric(name.replace("rouge", "ROUGE-"), mean_of(value), ratio, signature=signature)


# ------------------------------------------------------------------------------------------- variety


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = tokens(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _distinct(n: int) -> Metric:
    """Different n-grams over all n-grams of all completions (Li et al. 2016, section 5.2)."""

    def statistics(predictions: Sequence[Prediction]) -> np.ndarray:
        seen, rows = set[tuple[str, ...]](), list[list[int]]()
        for p in predictions:
            grams = _grams(p.text, n)
            rows.append([len(set(grams) - seen), len(grams)])
            seen.update(grams)
        return np.asarray(rows, np.float64)

    # What is new in a completion depends on those before it, so rows cannot be drawn anew.
    return Metric(f"distinct-{n}", statistics, ratio, resampled=False)


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that were there before (seq-rep-n; Welleck et al. 2020, section 6)."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def _per_completion(value: Callable[[str], float]) -> Callable[[Sequence[Prediction]], np.ndarray]:
    return mean_of(lambda p: value(p.text))


def _reference_statistics(predictions: Sequence[Prediction]) -> np.ndarray:
    pairs = [(0.0, 0) if p.reference is None else p.reference for p in predictions]
    return np.asarray([(-logprob, count) for logprob, count in pairs], np.float64)


def _perplexity(sums: np.ndarray) -> float:
    nats = ratio(sums)
    return math.exp(nats) if nats < 700 else math.inf


TEXTS: dict[str, Metric] = {
    "bleu": _sacre("bleu", "BLEU"),
    "chrf": _sacre("chrf", "chrF"),
    **{name: _rouge_metric(name) for name in ("rouge1", "rouge2", "rougeL")},
    "distinct1": _distinct(1),
    "distinct2": _distinct(2),
    "self_repetition": Metric("repeated 4-grams", _per_completion(repetition), ratio, higher_is_better=False),
    "length": Metric("words of a completion", _per_completion(lambda text: len(tokens(text))), ratio),
    "perplexity": Metric(
        "perplexity of references",
        _reference_statistics,
        _perplexity,
        higher_is_better=False,
        needs="reference",
    ),
}
