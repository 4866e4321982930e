"""Labels, scores, embeddings and tokens over HTTP are those of the Python interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import pytest
from tiny import FLOAT32, HERE, ONE, mesh
from tiny_serving import HI, serving, tiny_model

from jaxgpt.api import Model
from jaxgpt.config import GPT, Classification, Classifier, Labelled, Run, Tagged
from jaxgpt.models import init_params
from jaxgpt.sample.load import Trained
from jaxgpt.serve.app import make_app
from jaxgpt.serve.service import Service
from jaxgpt.text.chat import prompt_ids
from jaxgpt.text.tokenizer import ByteTokenizer

BACKBONE = GPT(vocab_size=264, context=32, layers=1, width=32, heads=2, causal=False)
TAGS, LABELS = ("O", "B-PER", "I-PER"), ("no", "yes")
Ask = Callable[..., httpx.Response]


def headed(folder: Path, name: str, text: str, labels: tuple[str, ...], kind: Any, **more: Any) -> Model:
    """A model of random parameters that tells labels apart."""
    (folder / name).write_text(text)
    files = (str(folder / name),)
    data = kind(train=files, validation=files, tokenizer="byte", **more)
    pool = {} if kind is Tagged else {"pool": "mean"}
    model = Classifier(backbone=BACKBONE, labels=labels, **pool)  # type: ignore[arg-type]
    run = Run(
        name="labels", runs=str(folder), model=model, data=data, objective=Classification(), compute=FLOAT32
    )
    params = init_params(model, FLOAT32, HERE, jax.random.key(1))
    params["head"]["weight"] = params["head"]["weight"] * 50
    return Model(Trained(run.folder, run, params, ByteTokenizer(), mesh(ONE), 1))


def asking(model: Model) -> Iterator[Ask]:
    """A server of a model without an engine."""
    with serving(make_app(Service(name="labels", model=model, engine=None))) as address:
        yield lambda path, **body: httpx.post(address + path, json={"model": "labels"} | body, timeout=60)


@pytest.fixture
def ask(address: str) -> Ask:
    return lambda path, **body: httpx.post(address + path, json={"model": "tiny"} | body, timeout=60)


def test_a_classifier_gives_labels(tmp_path: Path) -> None:
    model = headed(tmp_path, "a.tsv", "text\tlabel\nAda runs\tyes\nRome\tno\n", LABELS, Labelled)
    for ask in asking(model):
        for given in ("Ada", ["Ada", "Rome", ""]):
            made = ask("/v1/classify", input=given)
            found: Any = model.predict([given] if isinstance(given, str) else given)
            data = made.json()["data"]
            assert [entry["label"] for entry in data] == [label.label for label in found]
            assert data[0]["scores"].keys() == set(LABELS)
            assert data[0]["score"] == pytest.approx(found[0].score, abs=1e-6)
        for wrong in ([["a", "b"]], [[]], []):
            assert ask("/v1/classify", input=wrong).status_code == 400
        said = ask("/v1/chat/completions", messages=HI)
        assert (said.status_code, said.json()["error"]["code"]) == (400, "not_generative")
        vectors = ask("/v1/embeddings", input=["ab", "cd"]).json()["data"]
        assert len(vectors[1]["embedding"]) == 32


def test_a_tagger_gives_spans(tmp_path: Path) -> None:
    model = headed(tmp_path, "a.bio", "Ada B-PER\nruns O\n", TAGS, Tagged)
    for ask in asking(model):
        made = ask("/v1/classify", input=["Ada runs far", "so it goes"]).json()["data"]
        found: Any = model.predict(["Ada runs far", "so it goes"])
        assert [[span["text"] for span in entry["spans"]] for entry in made] == [
            [span.text for span in spans] for spans in found
        ]
        words = ask("/v1/classify", input=[["Ada", "runs"]])
        assert words.status_code == 200
        assert ask("/v1/classify", input=[[]]).status_code in (200, 400)


def test_scores_are_those_of_the_model(ask: Ask) -> None:
    made = ask("/score", context="ab", continuation=["c", "de"]).json()
    expected = tiny_model().score(["ab", "ab"], ["c", "de"])
    assert [entry["logprob"] for entry in made["data"]] == pytest.approx([logprob for logprob, _ in expected])
    assert made["usage"]["prompt_tokens"] == 7
    uneven = ask("/score", context=["a", "b"], continuation=["c"])
    assert uneven.status_code == 400
    assert ask("/score", context="a", continuation="b" * 3000).status_code == 400


def test_tokens_and_back(ask: Ask) -> None:
    made = ask("/tokenize", prompt="naïve 你好").json()
    assert made["tokens"] == tiny_model().encode("naïve 你好")
    assert made["count"] == len(made["tokens"])
    assert ask("/detokenize", tokens=made["tokens"]).json() == {"prompt": "naïve 你好"}
    assert ask("/tokenize", messages=HI).json()["tokens"] == prompt_ids(HI, tiny_model().tokenizer)
    for wrong in ({}, {"prompt": "a", "messages": HI}, {"prompt": "a", "model": "other"}):
        assert ask("/tokenize", **wrong).status_code in (400, 404)
    assert ask("/detokenize", tokens=[10**6]).status_code == 400


def test_a_text_alone_and_what_the_tokenizer_is(address: str, ask: Ask) -> None:
    tokenizer = tiny_model().tokenizer
    alone = ask("/tokenize", prompt="ab", add_special_tokens=False).json()["tokens"]
    assert alone == tokenizer.encode("ab") == ask("/tokenize", prompt="ab").json()["tokens"][1:]
    told = httpx.get(f"{address}/tokenizer_info").json()
    for name in ("bos_token", "eos_token"):
        token = ask("/tokenize", prompt=told[name], add_special_tokens=False).json()["tokens"]
        assert token == [tokenizer.control[told[name]]]
    assert (told["vocab_size"], told["model_max_length"]) == (tokenizer.vocab_size, 1024)
    within = ask("/tokenize", prompt=f"a{told['eos_token']}", add_special_tokens=False).json()["tokens"]
    assert within == tokenizer.encode("a<|eos|>")  # text, as everywhere
    said = ask("/tokenize", messages=HI, add_special_tokens=True).json()["error"]
    assert said["param"] == "add_special_tokens"
    assert ask("/tokenize", messages=HI, add_special_tokens=False).status_code == 200


def test_embeddings_that_cannot_be_are_refused(ask: Ask) -> None:
    for wrong in (
        {"input": ""},
        {"input": []},
        {"input": [[]]},
        {"input": "a" * 5000},
        {"input": [10**6]},
        {"input": ["a"] * 257},
        {"input": "a", "dimensions": 8},
        {"input": "a", "pooling": "max"},
    ):
        made = ask("/v1/embeddings", **wrong)
        if wrong["input"] == "":  # the model reads <|bos|>
            continue
        assert made.status_code == 400, wrong
    last = ask("/v1/embeddings", input="abc", pooling="last").json()["data"][0]["embedding"]
    assert last == pytest.approx(tiny_model().embed(["abc"], "last")[0].tolist(), abs=1e-6)
