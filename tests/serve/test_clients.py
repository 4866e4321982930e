"""Programs made for OpenAI's API against a real server: Willison's llm, and lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from tiny_serving import CONTEXT, HI, tiny_model

CHOICES = [
    {"country": "France", "cities": ["Paris", "Rome"], "right": 0},
    {"country": "Italy", "cities": ["Paris", "Rome"], "right": 1},
    {"country": "Spain", "cities": ["Madrid", "Bern", "Oslo"], "right": 0},
    {"country": "Norway", "cities": ["Bern", "Oslo"], "right": 1},
]
TASK: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "The capital of {{country}} is",
    "doc_to_target": "{{right}}",
}


# ------------------------------------------------------------------------------------------------ llm


@pytest.fixture(scope="module")
def llm(address: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs llm with a folder of its own that knows the server; gives what it prints."""
    program = shutil.which("llm")
    if program is None:
        pytest.skip("llm is not installed: `uv tool install llm`")
    folder = tmp_path_factory.mktemp("llm")
    known = {"model_name": "tiny", "api_base": f"{address}/v1"}
    models = [
        known | {"model_id": "tiny", "supports_tools": True, "supports_schema": True},
        known | {"model_id": "tiny-text", "completion": True},
    ]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML

    def run(*words: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "PYTHONPATH"))}
        done = subprocess.run(
            [program, *words],
            env=environment | {"LLM_USER_PATH": str(folder)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    return run


def test_llm_writes_what_the_model_says(llm: Any) -> None:
    options = ("--option", "max_tokens", "12", "--option", "seed", "3", "--option", "temperature", "0")
    alone: Any = tiny_model().chat(HI, max_new_tokens=12, temperature=0)
    for way in ((), ("--no-stream",)):
        assert llm("--model", "tiny", *way, "Hi", *options) == alone.text.removesuffix("\n")
    text: Any = tiny_model().generate("Hi", max_new_tokens=12, temperature=0)
    assert llm("--model", "tiny-text", "Hi", *options) == text.text.removesuffix("\n")


def test_llm_keeps_schemas_offers_tools_and_goes_on(llm: Any) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    )
    made = llm("--model", "tiny", "--schema", schema, "Hi", "--option", "max_tokens", "40")
    assert json.loads(made).keys() == {"ok"}
    few = ("--option", "max_tokens", "8")
    llm("--model", "tiny", "--tool", "llm_version", "--system", "Be brief.", "Hi", *few)
    llm("--continue", "And then?", *few)
    usage = json.loads(llm("logs", "--json", "--count", "1"))[0]
    assert usage["input_tokens"] > 0
    assert 1 <= usage["output_tokens"] <= 8


# ------------------------------------------------------------------------------------------ lm-eval


@pytest.fixture(scope="module")
def harness(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Scores the server by a task over a local file, with neither network nor the user's caches."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(folder / "hf"))
        lm_eval = pytest.importorskip("lm_eval")
        pytest.importorskip("tenacity", reason="the harness asks servers with its extra: `lm-eval[api]`")
        from lm_eval.tasks import TaskManager

        def run(model: str, task: dict[str, Any], **how: Any) -> Any:
            path = "chat/completions" if "chat" in model else "completions"
            whole = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "capitals.jsonl")}}}
            batch = how.pop("batch_size", 1)
            made = lm_eval.simple_evaluate(
                model=model,
                model_args={"model": "tiny", "base_url": f"{address}/v1/{path}", "max_length": CONTEXT},
                tasks=[whole | {"task": "capitals"} | task],
                task_manager=TaskManager(include_defaults=False),
                batch_size=batch,
                bootstrap_iters=0,
                **how,
            )
            return made["results"]["capitals"], made["samples"]["capitals"]

        yield run


def logprob(context: str, answer: str) -> float:
    """Of an answer after a context, by the model in this process; nothing begins the text."""
    ids = [*f"{context}{answer}".encode()]
    logits_TV = tiny_model().logits([ids])[0].astype(np.float64)
    logp_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    begin = len(context.encode())
    return float(sum(logp_TV[at - 1, ids[at]] for at in range(begin, len(ids))))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_harness_compares_answers_as_the_model_does(harness: Any, batch: int) -> None:
    task = {"output_type": "multiple_choice", "doc_to_choice": "{{cities}}"}
    results, samples = harness("local-completions", task, batch_size=batch)
    right = 0
    for sample in samples:
        doc = sample["doc"]
        expected = [logprob(f"The capital of {doc['country']} is", f" {city}") for city in doc["cities"]]
        got = [value for ((value, _),) in sample["resps"]]
        np.testing.assert_allclose(got, expected, atol=1e-3)
        right += int(np.argmax(expected)) == doc["right"]
    assert results["acc,none"] == right / len(CHOICES)


def test_the_harness_measures_whole_texts(harness: Any) -> None:
    task = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{cities[0]}} and {{cities[1]}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    results, samples = harness("local-completions", task)
    texts = [f"{row['cities'][0]} and {row['cities'][1]}" for row in CHOICES]
    expected = [found for found, _ in tiny_model().score([""] * len(texts), texts)]  # after <|bos|>
    np.testing.assert_allclose([sample["resps"][0][0] for sample in samples], expected, atol=1e-3)
    bits = -sum(expected) / sum(len(text) for text in texts) / np.log(2)
    assert results["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_the_harness_has_answers_written(harness: Any, model: str) -> None:
    chat = "chat" in model
    task = {
        "output_type": "generate_until",
        "doc_to_target": "{{cities[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    results, samples = harness(model, task, **({"apply_chat_template": True} if chat else {}))
    right = 0
    for sample in samples:
        asked = f"The capital of {sample['doc']['country']} is"
        how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "stop": ["\n"]}
        if chat:
            expected: Any = tiny_model().chat([{"role": "user", "content": asked}], **how)
        else:
            expected = tiny_model().generate([[*asked.encode()]], **how)[0]
        assert sample["resps"][0][0] == expected.text
        right += expected.text == sample["target"]
    assert results["exact_match,none"] == right / len(CHOICES)


def test_a_token_that_ends_a_completion_has_its_log_probability(address: str) -> None:
    """The harness counts the tokens after its own: one for `max_tokens` of 1, whatever that is."""
    end = tiny_model().tokenizer.control["<|eos|>"]
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 1, "logprobs": 1, "echo": True}
    body |= {"temperature": 0, "logit_bias": {str(end): 100}}
    for stream in (False, True):
        made = httpx.post(f"{address}/v1/completions", json=body | {"stream": stream}, timeout=60).text
        events = [json.loads(line[6:]) for line in made.splitlines() if line.startswith("data: {")]
        choices = [choice for event in events or [json.loads(made)] for choice in event["choices"]]
        found = [choice["logprobs"] for choice in choices]
        assert [token for one in found for token in one["tokens"]] == ["<|bos|>", "a", "b", "<|eos|>"]
        assert [at for one in found for at in one["text_offset"]] == [0, 0, 1, 2]
        assert found[-1]["token_logprobs"][-1] < 0
        assert "".join(choice["text"] for choice in choices) == "ab"
        assert choices[-1]["finish_reason"] == "stop"
