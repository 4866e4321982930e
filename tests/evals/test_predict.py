"""Labels of new texts: what `eval` counts, at the words that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import FLOAT32, HERE, ONE, mesh

from jaxgpt.api import Model
from jaxgpt.config import GPT, Classification, Classifier, Labelled, Run, Tagged
from jaxgpt.data.readers.tagging import read_conll
from jaxgpt.errors import NotFinite, UserError
from jaxgpt.evals.labels import label_report
from jaxgpt.evals.perturb import PERTURBATIONS, perturb
from jaxgpt.evals.predict import Label, Span, Word, ensemble, predict, spans_of, tag, word_places
from jaxgpt.evals.robust import label_robustness
from jaxgpt.models import init_params
from jaxgpt.sample.load import Trained
from jaxgpt.text.tokenizer import ByteTokenizer

SIZES: dict[str, Any] = {"vocab_size": 264, "context": 32, "layers": 1, "width": 32, "heads": 2}
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
COLUMNS = "Ada O\nLovelace B-PER\n. O\n\nwe O\nlove O\nParis B-LOC\n, O\nRome B-LOC\nand O\nLondon B-LOC\n"
TABLE = "text\tother\tlabel\nAda runs\tEve\tyes\nParis is large and old and far away\tRome\tno\n"


def trained(folder: Path, model: Classifier, data: Any) -> Trained:
    """A run with random parameters, its head large enough that labels differ."""
    run = Run(
        name="labels",
        runs=str(folder),
        model=model,
        data=data,
        objective=Classification(),
        compute=FLOAT32,
    )
    params = init_params(model, FLOAT32, HERE, jax.random.key(1))
    params["head"]["weight"] = params["head"]["weight"] * 50
    return Trained(run.folder, run, params, ByteTokenizer(), mesh(ONE), 1)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tags")
    (folder / "a.bio").write_text(COLUMNS)
    files = (str(folder / "a.bio"),)

    def make(joiner: str = " ") -> Trained:
        data = Tagged(train=files, validation=files, tokenizer="byte", joiner=joiner)
        model = Classifier(backbone=GPT(**SIZES, causal=False), labels=LABELS)
        return trained(folder, model, data)

    return make


def classifier(folder: Path, pair: str = "") -> Trained:
    (folder / "a.tsv").write_text(TABLE)
    files = (str(folder / "a.tsv"),)
    data = Labelled(train=files, validation=files, tokenizer="byte", pair=pair)
    model = Classifier(backbone=GPT(**SIZES, causal=False), labels=("no", "yes"), pool="mean")
    return trained(folder, model, data)


def test_tags_are_those_that_eval_counts(tagger) -> None:
    """Words given as words, as text, one sentence at a time, and longer than the context: the same tags."""
    run = tagger()
    sentences = [s.words for s in read_conll(run.run.data.validation)]
    assert sum(map(len, sentences[1])) + len(sentences[1]) > SIZES["context"] - 2  # cut into pieces
    counted = label_report(run, "validation").predictions
    for given in (sentences, [" ".join(words) for words in sentences]):
        made = tag(run, given)
        assert [[word.tag for word in words] for words in made] == [found["tags"] for found in counted]
    assert len({t for found in counted for t in found["tags"]}) > 1
    alone = [words for sentence in sentences for words in tag(run, [sentence])]
    assert [[w.tag for w in words] for words in alone] == [[w.tag for w in words] for words in made]
    np.testing.assert_allclose([w.score for w in alone[0]], [w.score for w in made[0]], rtol=1e-5)
    assert [found["gold"] for found in counted] == [
        ["O", "B-PER", "O"],
        ["O", "O"] + ["B-LOC", "O"] * 2 + ["B-LOC"],
    ]
    assert [found["spans"] for found in counted] == [
        [vars(s) for s in spans] for spans in predict(run, sentences)
    ]
    model = Model(run)
    assert model.predict(sentences) == predict(run, sentences)
    assert model.embed(["Ada runs"]).shape == (1, SIZES["width"])
    with pytest.raises(UserError, match=r"holds a Classifier, which has no logits of tokens; use predict"):
        model.logits(["Ada"])


@pytest.mark.parametrize(
    ("text", "joiner", "words"),
    [
        ("Ada, it's U.S. law (3.5).", " ", "Ada|,|it|'s|U.S.|law|(|3.5|)|."),
        ("  Ada \t Lovelace\n\nruns ", " ", "Ada|Lovelace|runs"),
        ("“नमस्ते” — d'Ada's…", " ", "“|नमस्ते|”|—|d'Ada|'s|…"),
        ("我在 北京\u3000上海。", "", "我|在|北|京|上|海|。"),
        ("", " ", ""),
        (" \u3000", "", ""),
    ],
)
def test_words_of_a_text(text: str, joiner: str, words: str) -> None:
    assert "|".join(text[a:b] for a, b in word_places(text, joiner)) == words


ODD = [(" ", "  Ada \t Lovelace,\n runs. "), ("", "我在 北京\u3000上海。😀")]


@pytest.mark.parametrize(("joiner", "text"), ODD)
def test_offsets_point_at_the_words(tagger, joiner: str, text: str) -> None:
    run = tagger(joiner)
    (words,), (spans,) = tag(run, [text]), predict(run, [text])
    assert "".join(text[w.start : w.end] for w in words) == "".join(text.split())
    assert all(text[span.start : span.end] == span.text.strip() for span in spans)
    inside = {i for span in spans for i in range(span.start, span.end)}
    assert all((word.start in inside) == (word.tag != "O") for word in words)
    (again,) = tag(run, [[text[w.start : w.end] for w in words]])
    assert [w.tag for w in again] == [w.tag for w in words]  # whatever blanks stood between them


def test_spans_are_conllevals() -> None:
    """An I that cannot go on an entity begins one; the score is that of all its words together."""
    text, tags = "Ada Lovelace Rome Paris", ("I-PER", "I-PER", "I-LOC", "B-LOC")
    words = [Word(a, b, t, 0.5) for (a, b), t in zip(word_places(text, " "), tags, strict=True)]
    assert spans_of(text, words) == [
        Span(0, 12, "PER", 0.25, "Ada Lovelace"),
        Span(13, 17, "LOC", 0.5, "Rome"),
        Span(18, 23, "LOC", 0.5, "Paris"),
    ]


@pytest.mark.parametrize("pair", ["", "other"])
def test_labels_are_those_that_eval_counts(
    tmp_path: Path, pair: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = classifier(tmp_path, pair)
    rows = [line.split("\t") for line in TABLE.splitlines()[1:]]
    texts = [(row[0], row[1]) if pair else row[0] for row in rows]
    found = predict(run, texts)
    counted = label_report(run, "validation").predictions
    assert [f | {"gold": g} for f, g in zip(map(vars, found), ("yes", "no"), strict=True)] == [
        {key: value for key, value in record.items() if key not in ("text", "pair")} for record in counted
    ]
    for label in found:
        assert isinstance(label, Label)
        assert sum(label.scores.values()) == pytest.approx(1)
        assert label.score == max(label.scores.values()) == label.scores[label.label]
    assert "1 of 2 texts are longer than 32 tokens" in caplog.text


def test_what_a_run_cannot_read_is_said(tagger, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="text 0 is one text; this classifier reads pairs of texts"):
        predict(classifier(tmp_path, "other"), ["Ada"])
    with pytest.raises(UserError, match="text 1 is 2 texts; this classifier reads one text at a time"):
        predict(classifier(tmp_path), ["Ada", ("Ada", "Eve")])
    run = tagger()
    assert predict(run, []) == [] and predict(run, [" "]) == [[]]
    assert len(tag(run, ["x" * 40 + " Ada"])[0]) == 2
    assert "1 words have more than 30 tokens each" in caplog.text
    broken = run._replace(params=run.params | {"bias": run.params["bias"] * np.nan})
    with pytest.raises(NotFinite):
        predict(broken, ["Ada"])


def test_what_is_disturbed_costs_what_its_predictions_say(tagger, tmp_path: Path) -> None:
    """Drops are differences of the scores of the same examples; a text that does not change costs nothing."""
    run = classifier(tmp_path)
    found = label_robustness(run)
    assert [drop.name for drop in found.drops] == list(PERTURBATIONS) and found.examples == 2
    texts = [line.split("\t")[0] for line in TABLE.splitlines()[1:]]
    for drop in found.drops:
        answers = predict(run, [perturb(text, drop.name) for text in texts])
        right = [a.label == gold for a, gold in zip(answers, ("yes", "no"), strict=True)]
        assert drop.disturbed == pytest.approx(100 * np.mean(right))
        assert drop.drop.value == pytest.approx(drop.clean - drop.disturbed)
        assert drop.name in found.table()
    tags = label_robustness(tagger())
    report = label_report(tagger(), "validation").figures["default_micro_f1-score"]
    assert tags.drops[0].clean == pytest.approx(100 * report)


def test_an_ensemble_has_the_mean_of_its_members_probabilities(tmp_path: Path) -> None:
    """By hand on two runs of other parameters."""
    one = classifier(tmp_path)
    other = one._replace(params=init_params(one.run.model, FLOAT32, HERE, jax.random.key(7)))
    texts = ["Ada runs", "Paris is large"]
    both = predict(ensemble(one, [other]), texts)
    parts = zip(predict(one, texts), predict(other, texts), both, strict=True)
    for a, b, mean in parts:
        for label, score in mean.scores.items():
            assert score == pytest.approx((a.scores[label] + b.scores[label]) / 2, rel=1e-5)
    with pytest.raises(UserError, match="labels mean with"):
        wrong = Classifier(backbone=GPT(**SIZES, causal=False), labels=("maybe", "no"), pool="mean")
        ensemble(one, [trained(tmp_path, wrong, one.run.data)])
