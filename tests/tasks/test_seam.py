"""The seam of tasks: phrasings, what is held out, JSON, and a task of a user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jaxgpt.config import Mix, Run, Sample, Task, from_json, load, to_json
from jaxgpt.config.decoding import Beam
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.tasks import evaluation_samples, phrasing_of
from jaxgpt.errors import UserError
from jaxgpt.tasks import Translation
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
PAIRS = [
    ("red", "rot"),
    ("blue", "blau"),
    ("green", "gruen"),
    ("cat", "Katze"),
    ("cat", "Kater"),
    ("dog", "Hund"),
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    return str(tmp_path / "pairs.tsv")


def written(rows) -> tuple[str, str]:
    """The text of the first row, and what of it is trained."""
    row = rows[0]
    ids = [*row["tokens"].tolist(), int(row["targets"][-1])]
    trained = [int(t) for t, w in zip(row["targets"], row["weights"], strict=True) if w]
    return BYTES.decode([i for i in ids if i != BYTES.control["<|pad|>"]]), BYTES.decode(trained)


def test_only_answers_are_trained_in_one_of_the_ways_to_ask(pairs):
    task = Translation(train=(pairs,), validation=(pairs,), source="en", into="de", tokenizer="byte")
    text, trained = written(rows_of(task, BYTES, 1024, 0, 1))
    assert sorted(trained.split()) == sorted("".join(b for _, b in PAIRS).split()) or all(
        b in trained for _, b in PAIRS
    )
    assert not any(a in trained for a, _ in PAIRS)
    assert "German translation of this English" not in text
    text, _ = written(rows_of(task, BYTES, 1024, None, 1))
    assert text.count("What is the German translation of this English sentence?") == len(PAIRS)


def test_a_phrasing_is_a_function_of_the_sample_alone(pairs):
    task = Translation(train=(pairs,), validation=(pairs,), into="de")
    for _, sample in evaluation_samples(task):
        assert phrasing_of(task, sample, "train") == phrasing_of(task, sample, "train") in task.prompts
        assert phrasing_of(task, sample, "validation") == task.held_out


def test_answers_of_one_question_are_one_sample(pairs):
    samples = [
        sample
        for _, sample in evaluation_samples(Translation(train=(pairs,), validation=(pairs,), into="de"))
    ]
    assert {s.values["text"]: s.answers for s in samples}["cat"] == ("Katze", "Kater")
    assert len(samples) == len(PAIRS) - 1


def test_what_is_held_out_is_not_trained(pairs):
    task = Translation(train=(pairs,), validation_fraction=0.4, into="de")
    kept, held = ({s.key for _, s in evaluation_samples(task, split)} for split in ("train", "validation"))
    assert kept and held and not kept & held


def test_json_names_a_shipped_task_and_gives_it_back(pairs):
    run = Run(name="a", data=Mix(sources=(Translation(train=(pairs,), into="de", tokenizer="byte"),)))
    value = json.loads(json.dumps(to_json(run)))
    assert value["data"]["sources"][0]["kind"] == "jaxgpt.tasks:Translation"
    assert from_json(Run, value) == run
    value["data"]["sources"][0]["kind"] = "jaxgpt.tasks:Tranlation"
    with pytest.raises(UserError, match="Translation"):
        from_json(Run, value)


def test_a_task_of_ones_own_is_kept_with_its_run(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"word": "abc"}\n{"word": "xy"}\n')
    (tmp_path / "mine.py").write_text(
        """
from dataclasses import dataclass
from jaxgpt.config import Run, Sample, Task

@dataclass(frozen=True, kw_only=True)
class Backwards(Task):
    prompts: tuple[str, ...] = ("Reverse {word}.",)
    held_out: str = "{word} backwards"
    metrics: tuple[str, ...] = ("exact_match",)
    names = ("word",)

    def samples(self, record):
        yield Sample({"word": record["word"]}, (record["word"][::-1],))

def config():
    return Run(name="a", data=Backwards(train=(r"%s",), tokenizer="byte"))
"""
        % (tmp_path / "data.jsonl")
    )
    run = load(tmp_path / "mine.py")
    assert run.data.name == "backwards" and run.templated
    value = to_json(run)
    assert value["data"]["kind"] == f"{tmp_path / 'mine.py'}:Backwards"
    assert to_json(from_json(Run, value)) == value
    assert {s.answers[0] for _, s in evaluation_samples(run.data)} < {"cba", "yx"}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"prompts": ("Say {txt}",)}, r"data.prompts\[0\] is 'Say \{txt\}' but no value is called 'txt'"),
        ({"held_out": "Say it"}, "data.held_out .* names no value"),
        ({"prompts": ("a {text",)}, "expected '}'"),
        ({"prompts": ()}, "data.prompts is empty"),
        ({"prompts": ("{text}", "{text}?"), "held_out": "{text}"}, "one of data.prompts; leave it out there"),
        ({"source": "zh"}, "name two different fields"),
    ],
)
def test_mistakes_are_one_sentence(parts, words):
    with pytest.raises(UserError, match=words):
        Translation(train=("a.tsv",), **parts)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"en": "a", "fr": "b"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: no field .zh.; allowed: en, fr\); mend them"):
        evaluation_samples(Translation(train=(str(tmp_path / "a.jsonl"),)))


def test_a_task_that_names_no_value_or_gives_none_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"word": "abc"}\n')

    @dataclass(frozen=True, kw_only=True)
    class Nameless(Task):
        prompts: tuple[str, ...] = ("{word}",)
        held_out: str = "{word}?"
        metrics: tuple[str, ...] = ("bleu",)

        def samples(self, record):
            yield Sample({"wort": record["word"]}, ("a",))

    with pytest.raises(UserError, match="class Nameless names no values; set `names"):
        Nameless(test=("a.jsonl",))
    Nameless.names = ("word",)
    with pytest.raises(UserError, match="no value 'word'; did you mean 'wort'"):
        evaluation_samples(Nameless(validation=(str(tmp_path / "a.jsonl"),)))
    with pytest.raises(UserError, match="the task nameless names no files for validation"):
        evaluation_samples(Nameless(test=(str(tmp_path / "a.jsonl"),)))


def test_any_decoding_is_stored_with_a_task():
    task = Translation(train=("a.tsv",), decoding=Beam(beams=3))
    run = Run(name="a", data=replace(task, tokenizer="byte"))
    assert from_json(Run, json.loads(json.dumps(to_json(run)))).data.decoding == Beam(beams=3)
