"""A run as a model of lm-evaluation-harness (Gao et al.), the library `lm_eval`, an optional one.

Its tasks then run on a run as on any other model: `jaxgpt eval RUN --tasks arc_easy`, or from Python

    lm_eval.simple_evaluate(as_lm(Scorer.load("runs/gpt2")), tasks=["arc_easy"])
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxgpt.config import GPT
from jaxgpt.errors import NotFinite, UserError, require, require_known
from jaxgpt.evals.figure import Figure
from jaxgpt.evals.scoring import Scorer, progress
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.text.chat import prefix_length, prompt_text, quoted, written_ids
from jaxgpt.text.chat_template import MARK

log = logging.getLogger(__name__)

_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub", "datasets", "fsspec")
"""Libraries whose errors mean that a data set could not be had."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class RunModel:
    """The methods that `lm_eval.api.model.LM` asks for; `as_lm` makes an `LM` of it.

    Args:
      scorer: the model.
      batch_size: rows at a time.
      max_gen_toks: maximum number of tokens in an answer where a task does not say.
      seed: of sampled answers; the i-th request has seed + i.
    """

    def __init__(self, scorer: Scorer, batch_size: int = 32, max_gen_toks: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.scorer, self.batch_size, self.max_gen_toks, self.seed = scorer, batch_size, max_gen_toks, seed
        self.eot_token_id = scorer.tokenizer.control["<|eos|>"]
        self.prefix_token_id = scorer.before
        """What a text without a context follows, as every document in training."""
        self.max_length = scorer.context
        self._before = dict[str, int]()  # of a prefix LM's rendered dialogues: tokens before the first answer

    @property
    def eot_token(self) -> str:
        """The name of the token that ends a document."""
        return "<|eos|>"

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return f"jaxgpt-{self.scorer.tokenizer.digest[:16]}"

    @cached_property
    def generator(self) -> Generator:
        """Made once an answer is asked for: it holds the parameters again, in another form."""
        s = self.scorer
        return Generator(s.model, s.compute, s.params, s.tokenizer, mesh=s.mesh, bos=s.bos)

    # ------------------------------------------------------------------------------------- text

    def tok_encode(self, text: str) -> list[int]:
        """Ids of a document's beginning, or of a dialogue that `apply_chat_template` rendered."""
        if text.startswith(MARK):
            return written_ids(text, self.scorer.tokenizer)
        return self.scorer.encode(text)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation; a dialogue's are those of the prompt, to the end."""
        if not context.startswith(MARK):
            return self.scorer.pair(context, continuation)
        given = self.tok_encode(context)
        whole = self.tok_encode(context + quoted(continuation, self.scorer.tokenizer))
        return given, whole[len(given) :]

    def _given(self, context: str, ids: list[int]) -> int:
        """How many ids of a context come before the first answer of the dialogue that it is, if it is one."""
        known = self._before.get(context)
        if known is None and self._before:  # the harness may have added the beginning of an answer
            known = next((n for text, n in self._before.items() if context.startswith(text)), None)
        return len(ids) if known is None else known

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What `apply_chat_template` writes, in words or Jinja."""
        own = self.scorer.tokenizer.template
        return "<|bos|> then for each message <|role|> content <|end|>" if own is None else own.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A dialogue as `jaxgpt.text.chat` renders it, control tokens marked.

        Args:
          chat_history: messages with `role` and `content`.
          add_generation_prompt: end with what opens an answer; else the last message stays open.
        """
        tokenizer, model = self.scorer.tokenizer, self.scorer.model
        text = prompt_text(chat_history, tokenizer, unfinished=not add_generation_prompt)
        if isinstance(model, GPT) and model.prefix:
            answered = not add_generation_prompt and chat_history[-1]["role"] == "assistant"
            self._before[text] = prefix_length(chat_history[:-1] if answered else chat_history, tokenizer)
        return text

    # ---------------------------------------------------------------------------------- scoring

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy) of continuations, each given its context."""
        pairs = [self._pair(*request.args) for request in requests]
        about = "" if disable_tqdm else "log-likelihoods"
        prefix = [self._given(r.args[0], given) for r, (given, _) in zip(requests, pairs, strict=True)]
        scores = self.scorer.token_logprobs(pairs, self.batch_size, about, prefix)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of whole texts, in windows cut as the harness cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owner = [], []
        for number, request in enumerate(requests):
            ids = self.scorer.tokenizer.encode(request.args[0])
            cuts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs += map(make_disjoint_window, cuts)
            owner += [number] * (len(pairs) - len(owner))
        scores = self.scorer.token_logprobs(pairs, self.batch_size, "" if disable_tqdm else "whole texts")
        total = [0.0] * len(requests)
        for number, score in zip(owner, scores, strict=True):
            total[number] += score.logprob
        return total

    # ------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop strings.

        A context too long to leave room for the answer loses its beginning.

        Raises:
          UserError: no room for any context.
        """
        asked = [(i, *_wanted(request.args[1], self.max_gen_toks)) for i, request in enumerate(requests)]
        asked.sort(key=lambda one: (one[3], len(requests[one[0]].args[0])))  # alike in length together
        batches: list[list[Any]] = []
        for one in asked:
            if not batches or len(batches[-1]) == self.batch_size or batches[-1][0][3] != one[3]:
                batches.append([])
            batches[-1].append(one)
        answers, before = [""] * len(requests), self.scorer.truncated
        for batch in progress(batches, "" if disable_tqdm else "answers"):
            contexts = [requests[i].args[0] for i, *_ in batch]
            for (i, *_), answer in zip(batch, self._answer(contexts, batch), strict=True):
                answers[i] = answer
        if cut := self.scorer.truncated - before:
            log.warning(
                "%d of %d contexts lose their beginning, to leave room for answers", cut, len(requests)
            )
        return answers

    def _answer(self, contexts: list[str], batch: list[tuple[int, list[str], Sampling, int]]) -> list[str]:
        """Answers to some contexts of the same greatest length; they end once none can change."""
        most = batch[0][3]
        room = self.max_length - most
        require(
            room >= 1,
            f"max_gen_toks is {most} but the model's context is {self.max_length}, the question included; "
            "lower it in the task's generation_kwargs.",
        )
        encoded = [self.tok_encode(context) for context in contexts]
        self.scorer.truncated += sum(len(ids) > room for ids in encoded)
        prompts = [ids[-room:] for ids in encoded]
        given = map(self._given, contexts, encoded)
        prefix = [max(0, n - len(ids[:-room])) for n, ids in zip(given, encoded, strict=True)]
        numbers, untils, settings, _ = zip(*batch, strict=True)
        seeds = [(self.seed + i) % 2**32 for i in numbers]
        answers = self.generator.generate(
            prompts, settings, max_new_tokens=most, seeds=seeds, stop_strings=untils, prefix=prefix,
            apart=contexts[0].startswith(MARK),
        )  # fmt: skip
        if any(answer.finish_reason == "error" for answer in answers):
            raise NotFinite("logits in an answer are")
        return [answer.text for answer in answers]


def _wanted(given: Mapping[str, Any], most: int) -> tuple[list[str], Sampling, int]:
    """Stop strings, sampling and the maximum number of tokens that a task's `generation_kwargs` ask for."""
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") is True and "temperature" not in given:
        temperature = 1.0
    if given.get("do_sample") is False:
        temperature = 0.0
    sampling = Sampling(
        temperature=temperature, top_p=float(given.get("top_p") or 1.0), top_k=int(given.get("top_k") or 0)
    )
    asked = next((int(given[name]) for name in _LENGTHS if given.get(name) is not None), most)
    return until, sampling, asked


def as_lm(scorer: Scorer, **options: Any) -> Any:
    """The run as an `lm_eval.api.model.LM`.

    Args:
      scorer: the model.
      options: of `RunModel`.

    Raises:
      UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError(
            "tasks by name need lm-evaluation-harness, which is not installed; run `pip install lm-eval`."
        ) from None

    class RunLM(RunModel, LM):  # type: ignore[misc]
        """See `RunModel`."""

    return RunLM(scorer, **options)


def run_lm_eval(
    scorer: Scorer,
    tasks: Sequence[str],
    *,
    batch_size: int = 32,
    limit: int = 0,
    chat: bool = False,
) -> dict[str, dict[str, Figure]]:
    """Figures of lm-evaluation-harness's tasks, by task and metric (`acc`, or `exact_match (strict)`
    where a filter has a name).

    Args:
      scorer: the model.
      tasks: names of its tasks, or paths of YAML files that describe one.
      batch_size: rows at a time.
      limit: first records of each task; 0 means all.
      chat: render each question as a user's turn.

    Raises:
      UserError: an unknown task, or one whose data cannot be had.
    """
    lm = as_lm(scorer, batch_size=batch_size)
    # What bootstraps forks, which a process that runs JAX must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if not Path(task).is_file()]
    if named:
        log.info("looking up %s among the tasks of lm-evaluation-harness", ", ".join(named))
    manager = TaskManager(include_defaults=bool(named))
    for task in named:
        require_known(task, manager.all_tasks, f"task {task!r} is none of lm-evaluation-harness's")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            found = lm_eval.simple_evaluate(
                lm,
                tasks=list(tasks),
                limit=limit or None,
                log_samples=False,
                bootstrap_iters=1000,
                torch_random_seed=None,
                task_manager=manager,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK:
            raise
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"the data of {', '.join(tasks)} could not be had ({why}); connect to the network, or give the "
            "path of a task's YAML file with local data_files."
        ) from None
    assert found is not None
    return {task: _figures(values) for task, values in found["results"].items()}


def _figures(values: Mapping[str, Any]) -> dict[str, Figure]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` as figures by name."""
    figures = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        shown = name if kind == "none" else f"{name} ({kind})"
        figures[shown] = Figure(_number(value), _number(error))
    return figures


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
