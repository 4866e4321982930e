"""Everything that is found of one prediction, as JSON: what the page shows, and what lies beside it.

Shapes: T tokens, V vocabulary or labels, L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxgpt.config import CausalLM, Classification
from jaxgpt.data.packing import Rows
from jaxgpt.data.readers import rows_of
from jaxgpt.errors import UserError
from jaxgpt.evals.explain.ask import Asked, token_name
from jaxgpt.evals.explain.attribution import agreement, attribute
from jaxgpt.evals.explain.examples import Example, compare_examples
from jaxgpt.evals.explain.inside import MOST_MAPS, Inside, Reading, look_inside, rollout
from jaxgpt.evals.explain.question import answers
from jaxgpt.sample.load import Trained

TOP = 5
"""Alternatives shown for each token."""
SHOWN, AGAINST = 5, 3
"""Training examples shown that are nearest, and that speak most against."""
MOST_TEXT = 400
"""Characters of a training example."""
METHODS = ("gradient_x_input", "integrated_gradients", "leave_one_out")


def explained(
    trained: Trained, asked: Asked, *, baseline: int | None, bound: float, examples: int
) -> dict[str, Any]:
    """The findings.

    Args:
      trained: the run, in float32.
      asked: what is to be explained.
      baseline, bound: see `attribution.attribute`.
      examples: how many training examples are looked at.

    Raises:
      NotFinite: the model gives NaN.
    """
    name, question = _names(trained), asked.question
    inside = look_inside(trained, asked.whole, asked.targets_T, TOP)
    rolled_T = None
    if inside.mean_LTT is not None:
        T = len(question.tokens)
        rolled_T = rollout(inside.mean_LTT[:, :T, :T])[question.at]
    record: dict[str, Any] = {
        "kind": asked.kind,
        "tokens": [
            {"text": token_name(trained.tokenizer, token), "id": token, "part": part}
            for token, part in zip(asked.whole.tokens, asked.parts_T, strict=True)
        ],
        "explained": {"place": question.at, "word": asked.words[asked.places.index(question.at)]},
        "predictions": _predictions(trained, asked, inside, name),
        "attributions": [],
        "rollout": _numbers(rolled_T),
        "attention": _attention(inside),
        "lens": [_lens(reading, asked, name) for reading in inside.lens],
    }
    for one in attribute(trained, question, baseline, bound):
        methods = {method: getattr(one, f"{method}_T") for method in METHODS}
        more = {} if rolled_T is None else {"rollout": rolled_T}
        record["attributions"].append(
            {
                "output": name(one.output),
                "probability": math.exp(one.logprob),
                "logprob": one.logprob,
                "baseline_logprob": one.baseline,
                "steps": one.steps,
                "error": one.error,
                "reached": one.error <= bound,
                **{method: _numbers(x_T) for method, x_T in methods.items()},
                "agreement": agreement(methods | more, question.fixed),
            }
        )
    record["examples"] = _examples(trained, asked, examples)
    return record


def _names(trained: Trained) -> Callable[[int], str]:
    """What an output is called."""
    task = trained.run.task
    return task.labels.__getitem__ if task else lambda token: token_name(trained.tokenizer, token)


def _numbers(x: np.ndarray | None) -> list[float] | None:
    return None if x is None else [float(f"{value:.6g}") for value in x]


def _attention(inside: Inside) -> dict[str, Any] | None:
    """Shares [layer, head, token, token it attends to], of each head or their mean, if not too large."""
    maps_LHTT, mean_LTT = inside.maps_LHTT, inside.mean_LTT
    if maps_LHTT is not None:
        return {"of": "heads", "shares": np.round(maps_LHTT.astype(np.float64), 4).tolist()}
    if mean_LTT is None or mean_LTT.size > MOST_MAPS:
        return None
    return {"of": "mean", "shares": np.round(mean_LTT[:, None].astype(np.float64), 4).tolist()}


def _predictions(
    trained: Trained, asked: Asked, inside: Inside, name: Callable[[int], str]
) -> list[dict[str, Any]]:
    """What is predicted at each asked place: probability, rank and entropy, and the likeliest."""
    if asked.kind != "masked":
        found = [_at(inside.own, place) for place in asked.places]
    else:  # each token hidden in turn (Salazar et al. 2020)
        seen = replace(asked.question, tokens=tuple(asked.targets_T))
        hidden = [replace(seen, at=place).without(place) for place in asked.places]
        found = [
            _of_row(made_V, asked.targets_T[question.at])
            for made_V, question in zip(answers(trained, hidden), hidden, strict=True)
        ]
    return [
        {
            "place": place,
            "text": word,
            "output": name(asked.targets_T[place]),
            "probability": math.exp(one["logprob"]),
            "logprob": one["logprob"],
            "rank": one["rank"],
            "entropy": one["entropy"],
            "top": [[name(i), math.exp(p)] for i, p in one["top"]],
        }
        for place, word, one in zip(asked.places, asked.words, found, strict=True)
    ]


def _at(reading: Reading, place: int) -> dict[str, Any]:
    """One token of a reading."""
    return {
        "logprob": float(reading.logprob_T[place]),
        "rank": int(reading.rank_T[place]),
        "entropy": float(reading.entropy_T[place]),
        "top": _pairs(reading.top_TK[place], reading.top_logprob_TK[place]),
    }


def _of_row(logprob_V: np.ndarray, target: int) -> dict[str, Any]:
    """The same of one row of log-probabilities."""
    best = np.argsort(-logprob_V, kind="stable")[:TOP]
    finite = logprob_V[np.isfinite(logprob_V)].astype(np.float64)
    return {
        "logprob": float(logprob_V[target]),
        "rank": 1 + int((logprob_V > logprob_V[target]).sum()),
        "entropy": float(-(np.exp(finite) * finite).sum()),
        "top": _pairs(best, logprob_V[best]),
    }


def _pairs(outputs: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(map(int, outputs), map(float, logprobs), strict=True))


def _lens(reading: Reading, asked: Asked, name: Callable[[int], str]) -> dict[str, Any]:
    """What one hidden state would predict: at the explained place, and the likeliest at every token."""
    one, shown = _at(reading, asked.question.at), range(len(asked.question.tokens))
    return {
        "probability": math.exp(one["logprob"]),
        "rank": one["rank"],
        "entropy": one["entropy"],
        "top": [[name(i), math.exp(p)] for i, p in one["top"]],
        "likeliest": [
            [name(int(reading.top_TK[t, 0])), math.exp(float(reading.top_logprob_TK[t, 0]))] for t in shown
        ],
    }


def _examples(trained: Trained, asked: Asked, most: int) -> dict[str, Any]:
    """Training examples beside the question, or why there are none."""
    if not most:
        return {"missing": "--examples is 0"}
    run = trained.run
    try:
        rows: Rows = rows_of(
            run.data, trained.tokenizer, run.length, run.train.seed, run.train.batch_size, run.task
        )
    except (UserError, OSError) as error:
        return {"missing": f"the training data are not at hand: {error}"}
    own = isinstance(run.objective, CausalLM | Classification)
    found = compare_examples(trained, asked.question, rows, most, influence=own)

    def shown(chosen: list[Example]) -> list[dict[str, Any]]:
        return [
            {
                "row": one.row,
                "document": one.document,
                "influence": one.influence,
                "similarity": one.similarity,
                "text": trained.tokenizer.decode(one.tokens)[:MOST_TEXT],
            }
            for one in chosen
        ]

    by_influence = sorted(found, key=lambda one: -(one.influence or 0.0)) if own else []
    by_similarity = sorted(found, key=lambda one: -one.similarity)
    return {
        "digest": rows.fingerprint,
        "looked_at": len(found),
        "rows": rows.epoch_rows,
        "for": shown([one for one in by_influence if (one.influence or 0) > 0][:SHOWN]),
        "against": shown([one for one in reversed(by_influence) if (one.influence or 0) < 0][:AGAINST]),
        "alike": shown(by_similarity[:SHOWN]),
    }
