"""The Python interface: what it returns is what transformers, the loss and the commands compute."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import jax
import numpy as np
import pytest
from families import golden, write_folder
from tiny_evals import MODEL, ROWS, TEXT, save_run
from tiny_runs import text_run

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import Chat, Text
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.evals.loss import validation_loss

INSIDE = Path(__file__).parent / "goldens" / "inside.npz"
FAMILIES = sorted({name.partition("/")[0] for name in np.load(INSIDE)})
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase, *map("##{}".format, ascii_lowercase)]
SENTENCES = ["the cat sat", "seven dogs ran", "on"]


# -------------------------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hugging_face_folder_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    stored, inside = golden(name), np.load(INSIDE)
    folder = write_folder(tmp_path / name, stored["config"], stored["tensors"])
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *".,!?'-:"]) + "\n")
    before = sorted(folder.rglob("*"))
    model, row = jaxgpt.load(folder, dtype="float32"), stored["tokens"][0].tolist()
    assert sorted(folder.rglob("*")) == before
    assert (
        model.step == 0 and f"{model.config.model.layers} layers" not in repr(model) and name in repr(model)
    )
    hidden = model.hidden([row])
    assert np.abs(np.stack([hidden[i][0] for i in hidden]) - inside[f"{name}/hidden"]).max() < 1e-4
    (attention_LHTT,) = model.attention([row])
    assert np.abs(attention_LHTT - inside[f"{name}/attention"]).max() < 1e-5
    np.testing.assert_allclose(attention_LHTT.sum(-1), 1, atol=1e-5)
    assert np.abs(model.logits([row])[0] - inside[f"{name}/logits"]).max() < 1e-4
    if name == "gpt2":
        made = model.generate([row[:12]], max_new_tokens=12, temperature=0)
        assert made[0].ids == stored["greedy"][0].tolist()


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, and beside it `chat`: the same parameters as one tuned on dialogues."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "a.txt").write_text(TEXT, "utf-8")
    prepare([str(folder / "a.txt")], folder / "text", validation=0.3, split="tail", workers=1)
    save_run(folder / "chat", Chat(train=("a.jsonl",)))
    return save_run(folder / "run", Text(path=str(folder / "text")))


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    return jaxgpt.load(run)


def test_texts_of_a_batch_are_what_they_are_alone(model: Any) -> None:
    together = model.logits(SENTENCES)
    for text, logits_TV in zip(SENTENCES, together, strict=True):
        assert logits_TV.dtype == np.float32
        assert logits_TV.shape == (len(model.encode(text)), 264) == (len(model.tokens(text)), 264)
        np.testing.assert_allclose(logits_TV, model.logits([text])[0], atol=2e-5)
    hidden = model.hidden(SENTENCES, layers=[-1, 0])
    assert list(hidden) == [1, 0]
    mean_ND = np.stack([x_TD.mean(axis=0) for x_TD in hidden[1]])
    np.testing.assert_allclose(model.embed(SENTENCES), mean_ND, atol=1e-5)
    for pooling, place in (("first", 0), ("last", -1)):
        wanted_ND = np.stack([x_TD[place] for x_TD in hidden[1]])
        np.testing.assert_allclose(model.embed(SENTENCES, pooling=pooling), wanted_ND, atol=1e-5)


def test_attention_looks_back_only_and_within_the_window(run: Path, tmp_path: Path) -> None:
    held = replace(MODEL, layers=2, windows=(4, 0))
    windowed = jaxgpt.load(save_run(tmp_path / "windows", Text(path="none"), held))
    near_HTT, far_HTT = windowed.attention(["seven dogs ran"])[0]
    T = far_HTT.shape[-1]
    back_TT = np.arange(T)[:, None] - np.arange(T)
    assert (far_HTT[:, back_TT < 0] == 0).all() and (far_HTT[:, back_TT >= 0] > 0).all()
    assert ((near_HTT > 0) == ((back_TT >= 0) & (back_TT < 4))).all()
    np.testing.assert_allclose(near_HTT.sum(-1), 1, atol=1e-5)


def test_scores_add_up_to_the_loss(model: Any, run: Path, tmp_path: Path) -> None:
    ids = model.encode("seven dogs ran over")
    (logprob, greedy), (of_rest, _) = model.score([[ids[0]], ids[:7]], [ids[1:], ids[7:]])
    logits_TV = model.logits([ids])[0].astype(np.float64)
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    each = [logprobs_TV[i, token] for i, token in enumerate(ids[1:])]
    assert logprob == pytest.approx(sum(each), abs=1e-3) and not greedy
    assert of_rest == pytest.approx(sum(each[6:]), abs=1e-3)
    # Each is 32 tokens with its first and last, a row of its own: packing cuts none of them.
    lines = [{"text": f"{i} dogs ran over green hills".ljust(30, ".")} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "text", validation=0.5, workers=1)
    corpus = Corpus(tmp_path / "text", "validation")
    documents = [corpus.read(i, 0, 99).tolist() for i in range(len(corpus))]
    assert documents[0][0] == ids[0] and len(documents) > 3
    scores = model.score([document[:1] for document in documents], [document[1:] for document in documents])
    found = validation_loss(run, Text(path=str(tmp_path / "text")), batch_size=ROWS)
    assert found["targets"] == sum(len(document) - 1 for document in documents)
    total = -sum(logprob for logprob, _ in scores)
    assert found["loss"] == pytest.approx(total / found["targets"], abs=1e-5)


def test_a_greedy_continuation_is_scored_as_greedy(model: Any) -> None:
    made = model.generate("the cat", max_new_tokens=5, temperature=0)
    score, greedy = model.score([model.encode("the cat")], [made.ids])[0]
    assert greedy and score == pytest.approx(sum(made.logprobs), abs=1e-3)


def test_it_writes_what_the_commands_write(model: Any, run: Path) -> None:
    with redirect_stdout(StringIO()) as said:
        words = ["--prompt", "the cat", "--max-new-tokens", "6", "--seed", "3", "--n", "2", "--json"]
        assert main(["sample", str(run), *words]) == 0
    wanted = [json.loads(line)["ids"] for line in said.getvalue().splitlines()]
    made = model.generate(["the cat", "the cat"], max_new_tokens=6, seed=3)
    assert [one.ids for one in made] == wanted
    streamed = list(model.stream("the cat", max_new_tokens=6, seed=3))
    assert [token.id for token in streamed] == wanted[0]
    assert "".join(token.text for token in streamed) == made[0].text
    assert "6 tokens" in repr(made[0]) and len(repr(made[0])) < 200
    chat = jaxgpt.load(run.parent / "chat")
    messages = [{"role": "user", "content": "hi"}]
    one, (two,) = chat.chat("hi", max_new_tokens=4), chat.chat([messages], max_new_tokens=4)
    assert one == two == chat.chat(messages, max_new_tokens=4)
    assert [token.id for token in chat.stream(messages, max_new_tokens=4)] == one.ids
    assert chat.score([messages], ["hello"])[0][0] < 0


def test_wrong_calls_are_refused_in_one_sentence(model: Any, run: Path, tmp_path: Path) -> None:
    calls: dict[str, Any] = {
        "texts is a text; give a list": lambda: model.logits("seven"),
        "text 1 has 61 tokens but the model's context is 32": lambda: model.logits(["a", "a" * 60]),
        "text 0 has no token": lambda: model.embed([[]]),
        "text 0 holds the id": lambda: model.hidden([[9999]]),
        "layers holds 5; it must be between -2 and 1": lambda: model.hidden(["a"], layers=[5]),
        "layers holds 1; it must be between -1 and 0": lambda: model.attention(["a"], layers=[1]),
        "pooling is 'max'": lambda: model.embed(["a"], pooling="max"),
        "contexts is a text; give a list": lambda: model.score("a", ["b"]),
        "2 contexts and 1 continuations": lambda: model.score(["a", "b"], ["c"]),
        "generating has no setting 'temprature'; did you mean": lambda: model.generate("a", temprature=1.0),
        "temperature is -1": lambda: model.generate("a", temperature=-1.0),
        "max_new_tokens is 0": lambda: model.generate("a", max_new_tokens=0),
        "seed is -1": lambda: model.generate("a", seed=-1),
        "is no folder": lambda: jaxgpt.load(tmp_path / "nothing"),
        "it has no config.json": lambda: jaxgpt.load(tmp_path),
        "it has best, newest, 5": lambda: jaxgpt.load(run, checkpoint=77),
    }
    for words, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        assert words in str(error.value), str(error.value)
        assert "\n" not in str(error.value)


def test_long_texts_show_the_layers_that_are_named(tmp_path: Path) -> None:
    long = replace(MODEL, context=4096, width=16, heads=2, kv_heads=1)
    held = jaxgpt.load(save_run(tmp_path / "long", Text(path="none"), long))
    with pytest.raises(UserError, match=r"a text has 2101 tokens; above 2048 name some layers"):
        held.attention(["a" * 2100])
    assert held.attention(["a" * 2100], layers=[0])[0].shape == (1, 2, 2101, 2101)


def test_fit_trains_and_returns_the_model(run: Path, tmp_path: Path) -> None:
    config = text_run(run.parent / "text", tmp_path, "fitted")
    config = replace(config, train=replace(config.train, steps=4, save_every=2))
    model = jaxgpt.fit(config, progress=False)
    assert isinstance(model, jaxgpt.Model) and model.step == 4 and model.config == config
    again: list[Any] = []
    other = threading.Thread(target=lambda: again.append(jaxgpt.fit(config.folder, progress=False)))
    other.start()  # a notebook's cell may run in any thread
    other.join()
    jax.tree.map(np.testing.assert_array_equal, again[0].params, model.params)


def test_importing_the_package_imports_no_jax_and_says_nothing() -> None:
    code = "import sys, jaxgpt; assert 'jax' not in sys.modules; assert {'load', 'fit'} <= set(dir(jaxgpt))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(AttributeError, match="'jaxgpt' has no attribute 'lode'"):
        _ = jaxgpt.lode
