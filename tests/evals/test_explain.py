"""Why a model predicts what it predicts: its attributions, layers and examples, worked out by hand.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GPT2, HERE, ONE, mesh, model_of, plain, sharp_params
from tiny_evals import COMPUTE, MODEL, save_run

from jaxgpt.batch import Batch, Features
from jaxgpt.config import (
    GPT,
    Architecture,
    Bert,
    Chat,
    Classification,
    Classifier,
    Labelled,
    MaskedLM,
    Run,
    Tagged,
    Text,
    TransformerXL,
)
from jaxgpt.data.packing import Item, PackedExamples
from jaxgpt.errors import UserError
from jaxgpt.evals.explain.ask import ask_answer, ask_label, ask_masked, ask_tag
from jaxgpt.evals.explain.attribution import agreement, attribute
from jaxgpt.evals.explain.examples import compare_examples, documents
from jaxgpt.evals.explain.inside import look_inside, rollout
from jaxgpt.evals.explain.question import Question, answers
from jaxgpt.evals.explain.record import explained
from jaxgpt.evals.predict import Label, predict
from jaxgpt.evals.scoring import Scorer
from jaxgpt.explain import explain
from jaxgpt.layers.linear import Embedding
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models import init_params
from jaxgpt.models.predictor import Predictor
from jaxgpt.sample.load import Trained
from jaxgpt.text.tokenizer import ByteTokenizer

SIZES: dict[str, Any] = {"vocab_size": 264, "context": 32, "layers": 1, "width": 16, "heads": 2}
WORDS = tuple(b"the cat")
SETTINGS: dict[str, Any] = {"baseline": None, "bound": 0.01, "examples": 0}


def trained(model: Any, params: Any = None, **parts: Any) -> Trained:
    """A run with random parameters, on one device."""
    own: dict[str, Any] = {"name": "tiny", "model": model, "compute": COMPUTE}
    own["data"] = Text(path="none", contiguous=isinstance(model, TransformerXL))
    own |= {"objective": MaskedLM()} if isinstance(model, Bert) else {}
    run = Run(**own | parts)
    return Trained(run.folder, run, params or sharp_params(model), ByteTokenizer(), mesh(ONE), 1)


def asked_of(ids: tuple[int, ...], output: int, **more: Any) -> Question:
    """What follows these ids."""
    return Question(ids, len(ids) - 1, (output,), (False,) * len(ids), **more)


# ---------------------------------------------------------------------------------- attributions


@dataclass(frozen=True, kw_only=True)
class Adder(Architecture):
    """Adds up embeddings, which is linear; one output's logit is far below those of all others."""

    vocab_size: int = 264
    context: int = 32
    layers: int = 1
    width: int = 4
    heads: int = 1

    @property
    def blocks(self) -> GPT:
        return GPT(**{name: getattr(self, name) for name in SIZES}, position="none")

    def module(self) -> type:
        return AdderModule


class AdderModule(Predictor):
    """The module of `Adder`."""

    def __init__(self, model: Adder, compute: Any, target: Any, key: Any, *, scanned: bool = True) -> None:
        self.model, self.compute, self.target = model, compute, target
        self.embed = Embedding(key, model.vocab_size, model.width, std=1.0)
        self.head = nnx.Param(jnp.zeros((model.vocab_size, model.width)), axes=("vocab", "embed"))

    @property
    def unembedding(self) -> Unembedding:
        bias_V = jnp.where(jnp.arange(self.model.vocab_size) == 7, -60.0, 0.0)
        return Unembedding(self.head[...], bias_V)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        return Features(jnp.cumsum(self.embed(batch.tokens_BT, jnp.dtype("float32")), axis=1))


def test_on_a_linear_model_all_attributions_are_its_terms() -> None:
    """log p = w . sum of embeddings - 60 - log(V - 1), up to e^-40: each token does what its term is."""
    random = np.random.default_rng(0)
    table_VD = random.standard_normal((264, 4)).astype(np.float32)
    head_VD = np.zeros((264, 4), np.float32)
    head_VD[7] = w_D = random.standard_normal(4).astype(np.float32)
    params = {"embed": {"weight": jnp.asarray(table_VD)}, "head": jnp.asarray(head_VD)}
    run = trained(Adder(), params)
    (found,) = attribute(run, asked_of(WORDS, 7))
    terms_T = table_VD[list(WORDS)] @ w_D
    assert found.logprob == pytest.approx(terms_T.sum() - 60 - np.log(263), abs=1e-4)
    for method in (found.gradient_x_input_T, found.integrated_gradients_T, found.leave_one_out_T):
        np.testing.assert_allclose(method, terms_T, atol=2e-4)
    assert found.steps == 14 and found.error < 1e-4
    (against,) = attribute(run, asked_of(WORDS, 7), baseline=9)  # another baseline: less its own term
    np.testing.assert_allclose(against.integrated_gradients_T, terms_T - table_VD[9] @ w_D, atol=2e-4)
    inside = look_inside(run, asked_of(WORDS, 7), [7] * len(WORDS))  # neither layers nor attention
    assert inside.lens == [] and inside.mean_LTT is None


def test_integrated_gradients_sum_to_what_two_forward_passes_differ_by(scorer: Scorer) -> None:
    """Both ends are scored without gradients: the baseline with a table whose rows of the text are zeros."""
    run, fixed = trained(MODEL), (True, *(False,) * len(WORDS))
    ids = (ByteTokenizer().control["<|bos|>"], *WORDS)
    question = replace(asked_of(ids, ord("a")), fixed=fixed)
    (found,) = attribute(run, question, bound=1e-3)
    params = sharp_params(MODEL)
    blank = params | {"embed": {"weight": params["embed"]["weight"].at[jnp.array(WORDS)].set(0)}}
    high, low = (
        Scorer(MODEL, COMPUTE, p, ByteTokenizer(), mesh(ONE)).token_logprobs([(ids, [ord("a")])])[0].logprob
        for p in (params, blank)
    )
    assert (found.logprob, found.baseline) == pytest.approx((high, low), abs=1e-4)
    assert abs(high - low) > 0.1
    assert found.integrated_gradients_T.sum() == pytest.approx(high - low, abs=1e-3 * abs(high - low) + 1e-5)
    assert found.error <= 1e-3 and found.integrated_gradients_T[0] == found.gradient_x_input_T[0] == 0
    # leave-one-out, by hand: the text without each token
    without = [([*ids[:t], *ids[t + 1 :]], [ord("a")]) for t in range(1, len(ids))]
    lost_T = [high - score.logprob for score in scorer.token_logprobs(without)]
    np.testing.assert_allclose(found.leave_one_out_T, [0, *lost_T], atol=1e-4)


def test_what_cannot_be_reached_in_so_many_steps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxgpt.evals.explain.attribution.MOST", 2)
    (found,) = attribute(trained(MODEL), asked_of(WORDS, 5), bound=1e-9)
    assert found.steps == 2 * 14 and found.error > 1e-9


def test_agreement_is_of_ranks_over_the_text_alone() -> None:
    a, b = np.array([9.0, 1, 2, 3, 4]), np.array([-9.0, 10, 30, 20, 40])
    (found,) = agreement({"a": a, "b": b}, (True, *(False,) * 4))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two neighbours exchanged
    assert found["kendall"] == pytest.approx((5 - 1) / 6)
    assert agreement({"a": a, "b": b * 0}, (False,) * 5)[0]["spearman"] is None


# ---------------------------------------------------------------------------------------- inside


@pytest.mark.parametrize(
    "model",
    [
        GPT2,
        Bert(**SIZES | {"vocab_size": 64}),
        TransformerXL(**SIZES, cutoffs=(32,), div=2, segment=16, memory=16),
    ],
    ids=["gpt2", "bert", "xl"],
)
def test_the_lens_behind_the_last_layer_is_the_model(model: Any) -> None:
    ids, targets = tuple(range(3, 12)), [4] * 9
    inside = look_inside(trained(model), asked_of(ids, 4), targets)
    logits_TV = model_of(model, COMPUTE)(sharp_params(model))
    wanted_TV = jax.nn.log_softmax(logits_TV.logits(logits_TV.hidden(plain(jnp.array([ids]))).x_BTD)[0])
    assert len(inside.lens) == model.layers + 1
    for reading in (inside.own, inside.lens[-1]):
        np.testing.assert_allclose(reading.logprob_T, wanted_TV[:, 4], atol=2e-4)
        np.testing.assert_array_equal(reading.top_TK[:, 0], wanted_TV.argmax(-1))
        np.testing.assert_array_equal(reading.rank_T, 1 + (wanted_TV > wanted_TV[:, 4:5]).sum(-1))
        np.testing.assert_allclose(reading.entropy_T, -(jnp.exp(wanted_TV) * wanted_TV).sum(-1), atol=2e-4)
    assert abs(inside.lens[0].logprob_T - inside.own.logprob_T).max() > 0.01
    assert inside.maps_LHTT is not None and inside.mean_LTT is not None
    assert inside.maps_LHTT.shape == (model.layers, model.heads, 9, 9)
    np.testing.assert_allclose(inside.mean_LTT.sum(-1), 1, atol=1e-5)


def test_rollout_of_two_layers_by_hand() -> None:
    first, second = np.array([[1.0, 0], [0.5, 0.5]]), np.array([[1.0, 0], [0.2, 0.8]])
    # half of each is the token itself: [[1, 0], [.25, .75]] and [[1, 0], [.1, .9]]
    np.testing.assert_allclose(rollout(np.stack([first, second])), [[1, 0], [0.1 + 0.9 * 0.25, 0.9 * 0.75]])


# ------------------------------------------------------------------------------ training examples


def test_influence_is_the_dot_product_of_two_gradients() -> None:
    """Each gradient is taken by itself, by the whole output projection; examples of a row are told apart."""
    items = [
        Item([5, 6, 7], [6, 7, 0], [1.0, 1.0, 0.0]),
        Item([9, 8], [8, 0], [1.0, 0.0]),
        Item([3], [1], [0.0]),
    ]
    rows = PackedExamples(items, 8, 4, None)
    assert [(row, place) for row, place, _ in documents(rows, 9)] == [(0, 1), (0, 2)]  # none without a target
    found = compare_examples(trained(MODEL), asked_of((5, 6), 7), rows, 9, influence=True)

    @jax.jit
    @jax.grad
    def slope(params: dict, ids: jax.Array, targets: jax.Array, learned: jax.Array) -> jax.Array:
        module = model_of(MODEL, COMPUTE)(params)
        return -(module.target_logprobs(module.hidden(plain(ids[None])).x_BTD, targets[None])[0] @ learned)

    mine_VD, *others = (
        np.asarray(slope(sharp_params(MODEL), *map(jnp.array, case))["head"]["weight"])
        for case in (
            ([5, 6, 0], [0, 7, 0], [0.0, 1.0, 0.0]),  # the question
            ([5, 6, 7], [6, 7, 0], [0.5, 0.5, 0.0]),
            ([9, 8, 0], [8, 0, 0], [1.0, 0.0, 0.0]),
        )
    )
    wanted = [float((mine_VD * other_VD).sum()) for other_VD in others]
    assert [one.influence for one in found] == pytest.approx(wanted, rel=1e-3)
    (same,) = compare_examples(
        trained(MODEL), asked_of((5, 6, 7), 7), PackedExamples(items[:1], 8, 4, None), 1, influence=False
    )
    assert same.influence is None and same.similarity == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------- kinds of models


def test_a_hidden_token_is_predicted_without_itself() -> None:
    model = Bert(**SIZES)
    run, mask = trained(model), ByteTokenizer().control["<|mask|>"]
    asked = ask_masked(run, "the cat", 4)
    assert asked.question.tokens[5] == mask and asked.question.outputs == (ord("c"),)
    record = explained(run, asked, **SETTINGS)
    whole = list(asked.targets_T)
    for place, one in zip(range(1, 8), record["predictions"], strict=True):
        ids = [*whole[:place], mask, *whole[place + 1 :]]
        logprob_V = next(answers(run, [Question(tuple(ids), place, (0,), (False,) * 9)]))
        assert one["logprob"] == pytest.approx(logprob_V[whole[place]], abs=1e-4)
    first = record["attributions"][0]
    assert first["logprob"] == pytest.approx(record["predictions"][4]["logprob"], abs=1e-5)
    # the mask itself is part of the frame; every other letter is masked in turn
    assert first["leave_one_out"][5] == 0 and all(first["leave_one_out"][i] for i in (1, 2, 3, 4, 6, 7))


def labels_of(kind: str) -> Trained:
    """A tagger or classifier with random parameters, its head large enough that labels differ."""
    backbone = GPT(**SIZES, causal=False)
    tags = kind == "tag"
    model = Classifier(
        backbone=backbone, labels=("O", "B-X", "I-X") if tags else ("no", "yes", "so"),
        pool="token" if tags else "mean",
    )  # fmt: skip
    files = {"train": ("none",), "validation": ("none",), "tokenizer": "byte"}
    data = Tagged(**files) if tags else Labelled(**files)
    params = init_params(model, COMPUTE, HERE, jax.random.key(1))
    params["head"]["weight"] = params["head"]["weight"] * 50
    return trained(model, params, data=data, objective=Classification())


@pytest.mark.parametrize("kind", ["tag", "label"])
def test_every_label_is_explained(kind: str) -> None:
    run, text = labels_of(kind), "Ada met Eve"
    asked = ask_tag(run, text, 2, 3) if kind == "tag" else ask_label(run, text, "", 2)
    record = explained(run, asked, **SETTINGS | {"examples": 5})
    made = record["attributions"]
    shares = {one["output"]: one["probability"] for one in made}
    if kind == "tag":
        assert [p["text"] for p in record["predictions"]] == ["Ada", "met", "Eve"] and len(made) == 3
        assert record["explained"] == {"place": asked.places[2], "word": "Eve"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    else:
        (wanted,) = predict(run, [text])
        assert isinstance(wanted, Label) and len(made) == 2
        assert shares == pytest.approx({n: p for n, p in wanted.scores.items() if n in shares}, rel=1e-4)
        assert made[0]["output"] == wanted.label
    for one in made:
        gap = one["logprob"] - one["baseline_logprob"]
        assert sum(one["integrated_gradients"]) == pytest.approx(gap, abs=0.01 * max(abs(gap), 0.1) + 1e-4)
    assert "not at hand" in record["examples"]["missing"]  # there are no such files


# ------------------------------------------------------------------------------------- the command


def test_the_page_is_whole_and_the_same_twice(text_run: Path, tmp_path: Path) -> None:
    """One file that loads nothing, the numbers beside it, and a command that makes them again."""
    given: dict[str, Any] = {"prompt": "the <b>cat</b>", "answer": " sat", "token": 1, "examples": 3}
    explain(str(text_run), **given, out=str(tmp_path / "a.html"))
    page, record = (tmp_path / "a.html").read_bytes(), json.loads((tmp_path / "a.json").read_text())
    explain(str(text_run), **given, out=str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").read_bytes() == page
    text = page.decode()
    assert (
        "<b>cat" not in text and "default-src 'none'" in text and "script-src 'unsafe-eval' 'sha256-" in text
    )
    assert not re.findall(r"https?://|<link|<img|@import|\bsrc=|\bhref=", text)
    assert record["attributions"][0]["output"] == "s" and record["explained"]["word"] == "s"
    assert [t["part"] for t in record["tokens"]] == ["control", *["prompt"] * 14, *["answer"] * 4]
    assert {"for", "against", "alike", "digest"} <= record["examples"].keys()
    audit = record["audit"]
    assert audit["step"] == 5 and "--checkpoint 5" in audit["command"] and "--token 1" in audit["command"]
    assert len(audit["parameters"]) == 8 and audit["data"].startswith("text-")
    shares_LHTT = np.array(record["attention"]["shares"])
    assert shares_LHTT.shape == (1, 8, 19, 19) and record["attention"]["of"] == "heads"
    np.testing.assert_allclose(shares_LHTT.sum(-1), 1, atol=2e-3)
    explain(str(text_run), prompt="the", max_new_tokens=2, examples=0)  # an answer of its own, greedily
    (own,) = (text_run / "explain").glob("the-*.json")
    assert json.loads(own.read_text())["predictions"][-1]["rank"] == 1


def test_a_dialogues_answer_stands_behind_its_template(tmp_path: Path) -> None:
    run = save_run(tmp_path / "chat", Chat(train=("none.jsonl",), tokenizer="byte"))
    explain(str(run), prompt="a", system="b", answer="cd", token=2, out=str(tmp_path / "a.html"))
    record = json.loads((tmp_path / "a.json").read_text())
    pieces = ["<|bos|>", "<|system|>", "b", "<|end|>", "<|user|>", "a", "<|end|>"]
    pieces += ["<|assistant|>", "c", "d", "<|end|>"]
    assert [token["text"] for token in record["tokens"]] == pieces
    assert record["attributions"][0]["output"] == "<|end|>"
    moved = [x != 0 for x in record["attributions"][0]["leave_one_out"]]
    assert moved == [piece in "abcd" for piece in pieces[:-1]]  # the frame stays


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"answer": " sat", "token": 4}, "--token is 4 but the answer has 4 tokens, counted from 0"),
        ({"pair": "x"}, "--pair is given, but .* has no use for it; drop it"),
        ({"answer": "x" * 40}, "prompt and answer have 44 tokens but the model's context is 32"),
        ({"out": "page.pdf"}, "--out is 'page.pdf'; name a file that ends in .html"),
    ],
)
def test_what_cannot_be_explained_is_said(options: dict[str, Any], words: str, text_run: Path) -> None:
    with pytest.raises(UserError, match=words):
        explain(str(text_run), prompt="the", **options)


def test_an_answers_ids_are_those_of_the_whole_text() -> None:
    run = trained(MODEL)
    asked = ask_answer(run, WORDS, tuple("ä".encode()), 0)
    assert asked.words[-2:] == ["⟨C3⟩", "⟨A4⟩"]
    asked = ask_answer(run, WORDS, tuple(b" sat"), 2)
    assert asked.question.tokens == tuple(b"the cat s") and asked.question.outputs == (ord("a"),)
    assert asked.whole.tokens == tuple(b"the cat sat") and asked.question.at == asked.whole.at == 8
