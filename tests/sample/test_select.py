"""Choosing among samples: by log-probability, by functions and by what the samples agree on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from jaxgpt.config import GPT, MBR, BestOf, Sampling
from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.select import agreement

PROMPTS = [[5, 250, 7], list(range(40, 57))]
DRAWN = Sampling(temperature=0.7, top_k=9)
N = 5
CALL: dict[str, Any] = {"max_new_tokens": 9, "stop": [77, 3, 30, 12, 99]}
Tiny = tuple[GPT, dict, Generator]


def spaces(prompt: str, text: str, record: dict) -> int:
    """A score of a user's."""
    assert not record
    return -len(text) + len(prompt) * 0


def nothing(prompt: str, text: str, record: dict) -> None:
    """No score."""


def test_the_best_of_several_has_the_highest_score_and_each_is_a_sample(modern: Tiny) -> None:
    """The samples are those that single rows make, with the seeds that follow the prompt's."""
    generator = modern[2]
    seeds = [20 + i for i in range(N)] + [70 + i for i in range(N)]
    single = generator.generate([p for p in PROMPTS for _ in range(N)], DRAWN, seeds=seeds, **CALL)
    scores = {
        "logprob": lambda c: sum(c.logprobs),
        "mean_logprob": lambda c: np.mean(c.logprobs),
        spaces: lambda c: -len(c.text),
    }
    for scorer, score in scores.items():
        how: Any = BestOf(n=N, sampling=DRAWN, scorer=scorer)  # pyrefly: ignore
        made = generator.generate(PROMPTS, how, seeds=[20, 70], **CALL)
        for i, completion in enumerate(made):
            mine = single[i * N : (i + 1) * N]
            order = sorted(mine, key=lambda c: -score(c))
            assert [c.seed for c in completion.candidates] == [c.seed for c in order]
            assert [c.ids for c in completion.candidates] == [c.ids for c in order]
            assert completion.score == pytest.approx(score(order[0]), rel=1e-4)
            assert (completion.ids, completion.seed) == (order[0].ids, order[0].seed)
    with pytest.raises(
        UserError, match=r"scorer: nothing.. of .* returned None for the prompt .* finite number"
    ):
        generator.generate(PROMPTS, BestOf(scorer=nothing), **CALL)  # pyrefly: ignore
    with pytest.raises(UserError, match="scorer is 'none'; write logprob or mean_logprob, a function as"):
        generator.generate(PROMPTS, BestOf(scorer="none"), **CALL)


def test_the_sample_that_the_others_agree_with_is_chosen(modern: Tiny) -> None:
    made = modern[2].generate(PROMPTS, MBR(n=N, sampling=DRAWN), **CALL)
    for completion in made:
        texts = [c.text for c in completion.candidates]
        chrf = CHRF()
        means = [
            np.mean([chrf.sentence_score(t, [o]).score for j, o in enumerate(texts) if j != i])
            for i, t in enumerate(texts)
        ]
        np.testing.assert_allclose([c.score for c in completion.candidates], means, rtol=1e-9)
        assert completion.score == pytest.approx(max(means))
        assert len(set(texts)) > 1
    with pytest.raises(UserError, match="metric is 'meteor'"):
        modern[2].generate(PROMPTS, MBR(metric="meteor"), **CALL)


def test_equal_samples_count_as_often_as_they_were_drawn() -> None:
    calls = []

    def alike(text: str, other: str) -> float:
        calls.append((text, other))
        return float(text == other)

    assert agreement(["a", "a", "b", "a"], alike) == [2 / 3, 2 / 3, 0.0, 2 / 3]
    assert sorted(calls) == [("a", "a"), ("a", "b"), ("b", "a")]
    assert agreement(["a"], alike) == [0.0]
