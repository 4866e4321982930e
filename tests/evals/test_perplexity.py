"""Perplexities: windows by their definition, and figures against brute force and training's own."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sharp_params
from tiny_evals import MODEL, ROWS, TEXT

from jaxgpt.config import TransformerXL
from jaxgpt.errors import UserError
from jaxgpt.evals import perplexity
from jaxgpt.evals.perplexity import (
    Document,
    Total,
    read_split,
    read_texts,
    recurrent,
    sliding,
    windows,
)
from jaxgpt.evals.scoring import Scorer
from jaxgpt.text.tokenizer import ByteTokenizer

CONTEXT = MODEL.context


@given(st.integers(1, 60), st.integers(1, 20), st.data())
@settings(deadline=None)
def test_windows_score_every_token_once_with_enough_before_it(
    n: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    document = Document(np.arange(n), 0, 0, 0)  # ids tell their places
    rows = list(windows(document, context, stride))
    scored = [int(i) for row in rows for i in row.ids_N[row.start :]]
    assert scored == list(range(1, n))
    for row in rows:
        assert len(row.ids_N) <= context + 1
        for i in range(row.start, len(row.ids_N)):
            token = int(row.ids_N[i])
            assert i >= min(token, context - stride + 1), "tokens before it"
    if stride == context:
        assert [len(row.ids_N) - 1 for row in rows[:-1]] == [context] * (len(rows) - 1)
        assert all(row.start == 1 for row in rows)


def test_disjoint_windows_give_the_loss_of_training(text_run: Path, own_loss: dict[str, float]) -> None:
    """On one document the windows are the very rows that validation reads."""
    scorer = Scorer.load(text_run)
    documents = list(read_split(text_run.parent / "text", "validation", scorer.tokenizer))
    assert len(documents) == 1
    assert documents[0].bytes > 3 * CONTEXT
    figures = sliding(scorer, documents, batch_size=ROWS).figures()
    assert figures["tokens"] == own_loss["targets"]
    for name in ("loss", "bits_per_byte", "accuracy"):
        assert figures[name] == pytest.approx(own_loss[name], rel=1e-5)
    assert figures == sliding(scorer, documents, stride=CONTEXT, batch_size=ROWS).figures()


def test_a_stride_of_one_gives_every_token_its_full_context(scorer: Scorer) -> None:
    ids = scorer.encode(TEXT[:70])
    document = Document(np.asarray(ids, np.int32), 1, 1, 1)
    total = sliding(scorer, [document], stride=1, batch_size=ROWS)
    requests = [(ids[max(0, i - CONTEXT) : i], [ids[i]]) for i in range(1, len(ids))]
    brute = scorer.token_logprobs(requests, ROWS)
    assert total.nats == pytest.approx(-sum(score.logprob for score in brute), rel=1e-5)
    assert total.correct == sum(score.greedy for score in brute)
    assert abs(total.nats - sliding(scorer, [document], stride=8, batch_size=ROWS).nats) > 1e-3


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    scorer: Scorer, tmp_path: Path
) -> None:
    """Each figure from its definition: log(V) nats a byte."""
    blank = Scorer(
        MODEL, scorer.compute, jax.tree.map(jnp.zeros_like, scorer.params), scorer.tokenizer, scorer.mesh
    )
    (tmp_path / "a").write_text("naïve\n café  两 ", "utf-8")  # 3 words, 15 characters, 19 bytes
    (document,) = read_texts([str(tmp_path / "a")], scorer.tokenizer)
    assert (document.words, document.characters, document.bytes) == (3, 15, 19)
    figures = sliding(blank, [document] * ROWS, batch_size=ROWS).figures()
    assert figures["token_perplexity"] == pytest.approx(264, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-5)
    assert figures["bits_per_character"] == pytest.approx(19 / 15 * math.log2(264), rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(264 ** (19 / 3), rel=1e-4)


def test_a_figure_that_says_nothing_is_left_out() -> None:
    figures = Total(nats=900.0, tokens=300, words=1, bytes=0, characters=0).figures()
    assert figures["token_perplexity"] == pytest.approx(math.exp(3))
    assert not {"word_perplexity", "bits_per_byte", "bits_per_character"} & set(figures)


def test_texts_of_all_kinds_are_read(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    (tmp_path / "wiki.raw").write_bytes(b"\xef\xbb\xbfone two")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"text": "three"}\n{"text": ""}\n{"text": "four"}\n')
    found = read_texts([str(tmp_path / "wiki.raw"), str(tmp_path / "b.jsonl.gz")], tokenizer)
    bos = tokenizer.control["<|bos|>"]
    assert [d.ids_N.tolist() for d in found] == [
        [bos, *text.encode()] for text in ("one two", "three", "four")
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "holds no text"), (b"a\xff", r"is not UTF-8 \(offset 1\)"), (None, "cannot be read")],
)
def test_a_file_that_is_no_text_is_one_sentence(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_texts([str(tmp_path / "a")], ByteTokenizer()))


def test_settings_that_cannot_be_are_refused(scorer: Scorer, text_run: Path, tmp_path: Path) -> None:
    document = Document(np.arange(4), 1, 1, 1)
    with pytest.raises(UserError, match="stride is 33; it must be between 1 and the model's context of 32"):
        sliding(scorer, [document], stride=33)
    with pytest.raises(UserError, match="a GPT carries no memory"):
        recurrent(scorer, [document])
    manifest = json.loads((text_run.parent / "text" / "manifest.json").read_text())
    manifest["tokenizer"]["digest"] = "0" * 64
    other = tmp_path / "text"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "validation").symlink_to(text_run.parent / "text" / "validation")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        list(read_split(other, "validation", scorer.tokenizer))


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_is_held_at_a_time_changes_no_figure(
    at_once: int, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents are taken from an endless source only as they are needed, and sums are those of a list."""
    ids = np.random.default_rng(1).integers(0, 256, (40, 20)).astype(np.int32)
    documents = [Document(row, 1, 2, 3) for row in ids]
    whole = sliding(scorer, documents, batch_size=ROWS)
    monkeypatch.setattr(perplexity, "AT_ONCE", at_once)
    taken: list[int] = []
    score_rows = scorer.score_rows

    def watched(rows: list, *args: Any) -> Any:
        seen.append((len(taken), len(rows)))
        return score_rows(rows, *args)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(scorer, "score_rows", watched)
    total = sliding(scorer, (taken.append(1) or d for d in documents), batch_size=ROWS)
    assert total.nats == pytest.approx(whole.nats, rel=1e-6)
    assert total[1:] == whole[1:] and total[2:] == (40 * 19, 40, 80, 120)
    for number, (read, rows) in enumerate(seen, 1):
        assert rows <= at_once * ROWS and read <= number * at_once * ROWS


def test_memory_is_carried_from_segment_to_segment(scorer: Scorer) -> None:
    """One that holds all there was gives what one window over all gives; none, what a fresh start gives."""
    model = TransformerXL(
        vocab_size=264,
        context=32,
        segment=8,
        memory=32,
        layers=2,
        width=32,
        heads=4,
        mlp_width=64,
        dropout=0.0,
    )

    def xl(model: TransformerXL) -> Scorer:
        return Scorer(model, scorer.compute, params, scorer.tokenizer, scorer.mesh)

    params = sharp_params(model)
    ids = np.random.default_rng(0).integers(0, 256, 31).astype(np.int32)
    documents = [Document(ids[:n], 1, 1, 1) for n in (5, 31, 18)]
    whole = sliding(xl(model), documents, batch_size=ROWS)
    carried = recurrent(xl(model), documents, batch_size=2)
    assert carried.nats == pytest.approx(whole.nats, rel=1e-5)
    assert carried[1:] == whole[1:]

    blind = recurrent(xl(replace(model, eval_memory=0)), documents, batch_size=2)
    cut = [Document(d.ids_N[at : at + 9], 1, 1, 1) for d in documents for at in range(0, len(d.ids_N) - 1, 8)]
    assert blind.nats == pytest.approx(sliding(xl(model), cut, batch_size=ROWS).nats, rel=1e-5)
    assert abs(blind.nats - carried.nats) > 1e-3
