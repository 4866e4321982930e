"""A run under lm-evaluation-harness: its figures are our own, without any network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_hf
from tiny import sharp_params
from tiny_evals import ROWS, TEXT

from jaxgpt.errors import UserError
from jaxgpt.evals.harness import as_lm, run_lm_eval
from jaxgpt.evals.scoring import Scorer
from jaxgpt.evals.tasks import read_task, run_task
from jaxgpt.sample.generate import Completion
from jaxgpt.sample.settings import Sampling
from jaxgpt.text.chat import prompt_ids, render
from jaxgpt.text.chat_template import MARK
from jaxgpt.text.hf_tokenizer import HFTokenizer

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{{text}}}}}"
doc_to_target: {target}
"""
CHOICE = """doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
UNTIL = """generation_kwargs:
  until: []
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm_eval, imported once, with neither network nor the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        folder = tmp_path_factory.mktemp("hf")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(folder))
        pytest.importorskip("lm_eval")
        yield


def asked(*args: Any) -> list[Any]:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=pair) for pair in args]


def test_log_likelihoods_are_those_of_the_scorer(scorer: Scorer) -> None:
    lm, bos = as_lm(scorer, batch_size=ROWS), scorer.tokenizer.control["<|bos|>"]
    pairs = [("the cat", " sat"), ("", "on a"), ("the ", "dog")]
    tokens = [([bos, *b"the cat"], [*b" sat"]), ([bos], [*b"on a"]), ([bos, *b"the"], [*b" dog"])]
    scores = scorer.token_logprobs(tokens, ROWS)
    assert lm.loglikelihood(asked(*pairs)) == [(score.logprob, score.greedy) for score in scores]


def test_rolling_log_likelihood_is_of_the_whole_text(scorer: Scorer) -> None:
    lm, bos = as_lm(scorer, batch_size=ROWS), scorer.tokenizer.control["<|bos|>"]
    short, long = "the cat sat", TEXT[:75]
    whole, windows = lm.loglikelihood_rolling(asked((short,), (long,)))
    (score, *_) = scorer.token_logprobs([([bos], [*short.encode()])] * ROWS, ROWS)
    assert whole == pytest.approx(score.logprob, abs=1e-4)
    ids = [bos, *long.encode()]
    cuts = [0, 32, 64, len(ids) - 1]  # disjoint but for the last, which sees all that fits
    tokens = [(ids[max(0, b - 32 if b > 64 else a) : a + 1], ids[a + 1 : b + 1]) for a, b in pairwise(cuts)]
    assert windows == pytest.approx(sum(s.logprob for s in scorer.token_logprobs(tokens, ROWS)), abs=1e-3)


def test_answers_are_the_generators_up_to_the_stop_string(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    lm, bos = as_lm(scorer, batch_size=2), scorer.tokenizer.control["<|bos|>"]
    contexts = ["the cat", "on"]
    made = lm.generator.generate(
        [[bos, *c.encode()] for c in contexts], Sampling(temperature=0), max_new_tokens=9
    )
    stop = made[0].text[3:5]
    requests = asked(*((c, {"until": [stop], "max_gen_toks": 9}) for c in contexts))
    expected = [completion.text.split(stop)[0] for completion in made]
    assert lm.generate_until(requests) == expected
    assert len(expected[0]) <= 3
    # The last that fits: a context longer than the room loses its beginning.
    before = scorer.truncated
    long = asked((TEXT[:50], {"max_gen_toks": 9}), (TEXT[28:51], {"max_gen_toks": 9, "until": None}))
    first, second = lm.generate_until(long)
    kept = [*TEXT[:50].encode()][-23:]
    assert first == lm.generator.generate([kept, kept], Sampling(temperature=0), max_new_tokens=9)[0].text
    assert scorer.truncated == before + 2
    assert "2 of 2 contexts lose their beginning" in caplog.text
    assert isinstance(second, str)
    with pytest.raises(UserError, match="max_gen_toks is 32 but the model's context is 32"):
        lm.generate_until(asked(("a", {"max_gen_toks": 32})))


def test_sampling_is_asked_for_as_tasks_do(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = as_lm(scorer, batch_size=ROWS, seed=7), []

    def generate(prompts: list, settings: list, **options: Any) -> list[Any]:
        seen.extend(zip(settings, options["seeds"], [options["max_new_tokens"]] * len(prompts), strict=True))
        return [Completion([], [], "length", "", seed) for seed in options["seeds"]]

    monkeypatch.setattr(lm.generator, "generate", generate)
    given = [
        {},
        {"do_sample": False, "temperature": 0.7, "max_new_tokens": 3},
        {"do_sample": True, "max_gen_toks": 3},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "max_gen_toks": 3},
    ]
    lm.max_gen_toks = 5
    lm.generate_until(asked(*(("a", kwargs) for kwargs in given)))
    drawn = Sampling(temperature=0.5, top_p=0.9, top_k=4)
    greedy = Sampling(temperature=0)
    assert seen == [(greedy, 8, 3), (Sampling(temperature=1), 9, 3), (drawn, 10, 3), (greedy, 7, 5)]


def test_a_dialogue_is_rendered_as_in_training(scorer: Scorer) -> None:
    lm, tokenizer = as_lm(scorer), scorer.tokenizer
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "what is <|end|>? " + MARK}]
    assert lm.tok_encode(lm.apply_chat_template(messages)) == prompt_ids(messages, tokenizer)
    answer = [*messages, {"role": "assistant", "content": "an"}]
    opened = lm.apply_chat_template(answer, add_generation_prompt=False)
    whole = render([*messages, {"role": "assistant", "content": "answer"}], tokenizer)
    assert lm.tok_encode(opened + "swer") == whole.tokens[:-1]
    assert lm.tok_encode("plain") == scorer.encode("plain")
    with pytest.raises(UserError, match="role 'usr' is unknown; did you mean 'user'"):
        lm.apply_chat_template([{"role": "usr", "content": ""}])


@pytest.mark.parametrize("name", [*tiny_hf.TOKENIZERS, "never opens"])
def test_a_models_own_template_gives_the_same_ids_everywhere(name: str, scorer: Scorer) -> None:
    files = {"never opens": tiny_hf.byte_level(template=tiny_hf.CHATML.split("{% if add")[0])}
    tokenizer = HFTokenizer((tiny_hf.TOKENIZERS | files)[name], name)
    model = replace(scorer.model, vocab_size=512)
    lm = as_lm(Scorer(model, scorer.compute, sharp_params(model), tokenizer, scorer.mesh))
    typed = "what is <|im_end|>? </s>"
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(("hi", "cat", typed))]
    asked = lm.tok_encode(lm.apply_chat_template(turns))
    assert asked == prompt_ids(turns, tokenizer)
    assert asked == lm.generator.dialogues([turns])["prompts"][0]  # of `sample` and `chat`
    answered = [*turns, {"role": "assistant", "content": f"{typed} sat"}]
    if name != "thinking":  # which writes earlier answers otherwise once another follows
        assert render(answered, tokenizer).tokens[: len(asked)] == asked  # training
    if name in ("chatml", "never opens"):
        start, end = (tokenizer.special[mark] for mark in ("<|im_start|>", "<|im_end|>"))
        line, expected = tokenizer.encode("\n"), list[int]()
        for turn in turns:
            text = f"{turn['role']}\n{turn['content']}"
            expected += [start, *tokenizer.encode(text), end, *line]
        assert asked == [*expected, start, *tokenizer.encode("assistant\n")]
    # A continuation is scored after the whole prompt, and cannot write a control token either.
    begun = [*turns, {"role": "assistant", "content": "the"}]
    whole = lm.tok_encode(lm.apply_chat_template(begun, add_generation_prompt=False))
    assert whole[: len(asked)] == asked or name == "thinking"
    given, scored = lm._pair(lm.apply_chat_template(turns), " </s> cat<|im_end|>")
    assert given == asked
    assert not set(scored) & set(tokenizer.names)
    assert lm.chat_template() == tokenizer.template.source


def test_tasks_of_yaml_files_give_our_own_figures(scorer: Scorer, tmp_path: Path) -> None:
    contexts, words = ["the cat", "seven dogs"], ["sat", "ran over", "hills", "a"]
    lm = as_lm(scorer, batch_size=2)
    told, _ = lm.generate_until(asked(*((context, {"max_gen_toks": 8}) for context in contexts)))
    records = [
        {"context": context, "choices": words[i:] + words[:i], "label": i % 3, "said": told}
        for i, context in enumerate(contexts * 3)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "u.jsonl").write_text("\n".join(map(json.dumps, records[:2])))
    part = {"text": "context"}
    choice, until = tmp_path / "choice.yaml", tmp_path / "until.yaml"
    file = tmp_path / "c.jsonl"
    choice.write_text(
        TASK.format(name="mine", kind="multiple_choice", target="label", file=file, **part) + CHOICE
    )
    file = tmp_path / "u.jsonl"
    until.write_text(
        TASK.format(name="told", kind="generate_until", target="said", file=file, **part) + UNTIL
    )
    found = run_lm_eval(scorer, [str(choice), str(until)], batch_size=2)
    ours = run_task(scorer, read_task(tmp_path / "c.jsonl"), 2)
    assert list(found) == ["mine", "told"]
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert found["mine"][name] == pytest.approx(ours[name])
    assert 0 < ours["acc"].value < 1
    assert found["told"]["exact_match"].value == 0.5
    asked_ids = [prompt_ids([{"role": "user", "content": context}], scorer.tokenizer) for context in contexts]
    pairs = [(asked_ids[i % 2], [*f" {word}".encode()]) for i in range(6) for word in words[i:] + words[:i]]
    scores = iter(scorer.token_logprobs(pairs, 2))
    best = [max(range(4), key=[next(scores).logprob for _ in words].__getitem__) for _ in range(6)]
    dialogues = run_lm_eval(scorer, [str(choice)], batch_size=2, chat=True)
    assert dialogues["mine"]["acc"].value == sum(b == i % 3 for i, b in enumerate(best)) / 6
    one = run_task(scorer, read_task(tmp_path / "c.jsonl")[:1], 2)
    assert run_lm_eval(scorer, [str(choice)], batch_size=2, limit=1)["mine"]["acc"].value == one["acc"].value


def test_data_that_cannot_be_had_are_one_sentence(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "far.yaml"
    text = TASK.format(name="far", kind="multiple_choice", target="label", text="context", file="x") + CHOICE
    path.write_text(text.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(UserError, match=r"the data of .*far\.yaml could not be had \("):
        run_lm_eval(scorer, [str(path)])


def test_an_unknown_task_is_answered_without_all_names(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    """Of thousands of tasks a message names those that are near alone; the search is said first."""
    caplog.set_level("INFO")
    with pytest.raises(UserError, match=r"^task 'qqqqqqqq' is none of lm-evaluation-harness's; ") as caught:
        run_lm_eval(scorer, ["qqqqqqqq"])
    assert re.search(r"allowed: \d+,\d+ names", str(caught.value))
    assert len(str(caught.value)) < 200
    assert "looking up qqqqqqqq among the tasks" in caplog.text
