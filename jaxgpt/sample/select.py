"""Several samples of each prompt, drawn in one call, and which of them is taken.

Shapes: n samples of a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxgpt.config import MBR, BestOf, code
from jaxgpt.errors import UserError, require, require_known, shown
from jaxgpt.sample.completion import Call, Completion, Maker, Waiting, best_of
from jaxgpt.sample.judge import Judge, judged

Scorer = Callable[[Call, Sequence[Completion]], Sequence[float]]
"""From completions and the call that they are of, a row each, to scores."""
NEVER = float("-inf")


def best(maker: Maker, how: BestOf, call: Call) -> Waiting:
    """Of several samples of each prompt the first with the highest score.

    Raises:
      UserError: the scorer cannot be called.
    """
    scorer = _scorer(how.scorer, maker, call)
    return _draw(maker, how, call, lambda call, made, _: scorer(call, made))


def consensus(maker: Maker, how: MBR, call: Call) -> Waiting:
    """Of several samples of each prompt the one that is on average most similar to the others.

    Raises:
      UserError: there is no such metric.
    """
    similarity = _similarity(how.metric)

    def score(call: Call, made: Sequence[Completion], counts: Sequence[int]) -> list[float]:
        found, at = list[float](), 0
        for count in counts:
            found += agreement([c.text for c in made[at : at + count]], similarity)
            at += count
        return found

    return _draw(maker, how, call, score)


def _draw(maker: Maker, how: BestOf | MBR, call: Call, score: Callable[..., Sequence[float]]) -> Waiting:
    several = call.times(how.n)
    waiting = maker.draw(several, [how.sampling] * len(several.prompts), how.n)

    def result() -> list[Completion]:
        made = waiting()
        good = [row for row, completion in enumerate(made) if completion.finish_reason != "error"]
        counts = Counter(row // how.n for row in good)
        each = [counts[i] for i in range(len(call.prompts))]
        scores = dict(zip(good, score(several.only(good), [made[row] for row in good], each), strict=True))
        scored = [replace(c, score=scores.get(row, NEVER)) for row, c in enumerate(made)]
        return [best_of(scored[start : start + how.n]) for start in range(0, len(scored), how.n)]

    return result


def agreement(texts: Sequence[str], similarity: Callable[[str, str], float]) -> list[float]:
    """How similar each of n texts is to the others, on average.

    Args:
      texts: of which equal ones are compared once.
      similarity: of a text and another, taken as the reference.
    """
    counts = Counter(texts)
    means = dict[str, float]()
    for text in counts:
        others = counts - Counter([text])
        total = sum(n * similarity(text, other) for other, n in others.items())
        means[text] = total / max(len(texts) - 1, 1)
    return [means[text] for text in texts]


def _similarity(name: str) -> Callable[[str, str], float]:
    if code.is_reference(name):
        function = code.function_of(name, "metric")
        return lambda text, other: judged("metric", name, function, (text, other), f"for {shown(text)}")
    require_known(name, ("chrf", "bleu"), f"metric is {name!r}")
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError(
            "MBR compares texts by sacrebleu, which is not installed; run `pip install 'jaxgpt[eval]'`."
        ) from None
    library: Any = CHRF() if name == "chrf" else BLEU(effective_order=True)
    return lambda text, other: library.sentence_score(text, [other]).score


# ---------------------------------------------------------------------------------------- scorers


def _total(call: Call, made: Sequence[Completion]) -> list[float]:
    return [sum(completion.logprobs) for completion in made]


def _mean(call: Call, made: Sequence[Completion]) -> list[float]:
    return [sum(completion.logprobs) / max(len(completion.logprobs), 1) for completion in made]


LOGPROBS: dict[str, Scorer] = {"logprob": _total, "mean_logprob": _mean}


def _scorer(name: str, maker: Maker, call: Call) -> Scorer:
    if name in LOGPROBS:
        return LOGPROBS[name]
    if code.is_reference(name):
        return _by_function(name, maker)
    require(
        Path(name).is_dir(),
        f"scorer is {shown(name)}; write {' or '.join(LOGPROBS)}, a function as FILE.py:NAME, or the folder "
        "of a reward model's run.",
    )
    require(
        bool(call.turns),
        f"scorer is {shown(name)}: a reward model judges answers to dialogues, but these prompts are plain "
        f"texts; write {' or '.join(LOGPROBS)}, or a function as FILE.py:NAME.",
    )
    if name not in maker.judges:
        maker.judges[name] = Judge.load(name)
    judge = maker.judges[name]

    def score(call: Call, made: Sequence[Completion]) -> list[float]:
        answers = [{"role": "assistant", "content": completion.text} for completion in made]
        return judge([[*turns, answer] for turns, answer in zip(call.turns, answers, strict=True)]).tolist()

    return score


def _by_function(name: str, maker: Maker) -> Scorer:
    function = code.function_of(name, "scorer")

    def score(call: Call, made: Sequence[Completion]) -> list[float]:
        found = list[float]()
        for row, completion in enumerate(made):
            prompt = maker.tokenizer.decode(call.prompts[row])
            if call.turns:
                prompt = call.turns[row][-1]["content"]
            at = f"for the prompt {shown(prompt)} and the completion {shown(completion.text)}"
            found.append(judged("scorer", name, function, (prompt, completion.text, {}), at))
        return found

    return score
