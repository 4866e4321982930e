"""Every task that comes along reads the files of its field, asks, and reads its own answers back."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jaxgpt import tasks
from jaxgpt.config import Chat, Sample, Task
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.tagging import to_bio
from jaxgpt.data.readers.tasks import evaluation_samples, phrasing_of, question
from jaxgpt.errors import UserError
from jaxgpt.evals.metrics import METRICS, Prediction
from jaxgpt.tasks import (
    Arithmetic,
    DataToText,
    Dialogue,
    Entities,
    ExtractiveQA,
    Generation,
    MultipleChoice,
    OpenQA,
    QuerySummarization,
    Recommendation,
    Summarization,
    Support,
    TextClassification,
    Translation,
)
from jaxgpt.text.tokenizer import ByteTokenizer

QA = {
    "question": "Who?",
    "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann B", "answer_start": 0}],
}
SQUAD = {"context": "Ann B ran.", "qas": [QA, {"question": "Why?", "answers": [], "is_impossible": True}]}
ARC = {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}
TURNS = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
MEETING = {
    "meeting_transcripts": [{"speaker": "X", "content": "tea"}, {"speaker": "Y", "content": "milk"}],
    "general_query_list": [{"query": "all?", "answer": "both"}],
    "specific_query_list": [{"query": "Y?", "answer": "milk.", "relevant_text_span": [["1", "1"]]}],
}
RATINGS = "userId,movieId,rating,timestamp\n7,1,5.0,1\n7,2,1.0,2\n7,3,4.5,3\n8,1,5.0,1\n"
CONLL = "Ann B-PER\nBee I-PER\nran O\nto O\nRome B-LOC\n\nno O\none O\n"
BMES = "张 B-NAME\n三 E-NAME\n来 O\n\n"
MOVIES = 'movieId,title\n1,"Alien, 1979"\n2,Brazil\n3,Clue\n'

CASES: list[
    tuple[type[Task], dict[str, Any], str, Any, list[tuple[dict[str, str], tuple[str, ...], str]]]
] = [
    # task, fields, a file's name and content; of each question some values, the answers, what is learned
    (
        Dialogue,
        {},
        "a.json",
        [{"messages": [*TURNS, {"role": "assistant", "content": "d"}]}],
        [({"message": "c"}, ("d",), "d")],
    ),
    (
        Dialogue,
        {},
        "a.jsonl",
        {"instruction": "Add", "input": "1 1", "output": "2"},
        [({"message": "Add\n1 1"}, ("2",), "2")],
    ),
    (
        Support,
        {},
        "a.jsonl",
        {"question": "q", "answer": "a"},
        [({"message": "q"}, ("a",), "a")],
    ),
    (
        Generation,
        {"given": 2},
        "a.jsonl",
        {"text": "The quick fox  ran."},
        [({"beginning": "The quick"}, ("fox  ran.",), "fox  ran.")],
    ),
    (
        Generation,
        {"given": 30, "language": "zh"},
        "a.jsonl",
        {"text": "天地玄黄"},
        [({"beginning": "天地"}, ("玄黄",), "玄黄")],
    ),
    (
        Generation,
        {"prompt": "p", "completion": "c"},
        "a.csv",
        "p,c\nA cat,it sat\n",
        [({"beginning": "A cat"}, ("it sat",), "it sat")],
    ),
    (
        DataToText,
        {},
        "a.csv",
        'mr,ref\n"name[A], food[B]","A sells B."\n"name[A], food[B]",B is at A.\n',
        [({"data": "name[A], food[B]"}, ("A sells B.", "B is at A."), "A sells B.")],
    ),
    (
        DataToText,
        {"mr": "triples", "ref": "lex"},
        "a.json",
        [{"triples": [["A", "in", "B"], ["B", "is", "C"]], "lex": ["A is in B."]}],
        [({"data": "A | in | B; B | is | C"}, ("A is in B.",), "A is in B.")],
    ),
    (
        Translation,
        {},
        "a.tsv",
        "Hi.\t你好。\nHi.\t嗨。\n",
        [({"text": "Hi.", "target": "Chinese"}, ("你好。", "嗨。"), "你好。")],
    ),
    (
        Translation,
        {"source": "zh", "into": "en", "header": ("en", "zh")},
        "a.tsv",
        "Hi.\t嗨。\n",
        [({"text": "嗨。", "target": "English"}, ("Hi.",), "Hi.")],
    ),
    (
        Translation,
        {"source": "translation.de", "into": "translation.en"},
        "a.jsonl",
        {"translation": {"de": "Hallo", "en": "Hello"}},
        [({"text": "Hallo", "source": "German"}, ("Hello",), "Hello")],
    ),
    (
        ExtractiveQA,
        {},
        "a.json",
        {"version": "v2", "data": [{"title": "t", "paragraphs": [SQUAD]}]},
        [
            ({"passage": "Ann B ran.", "question": "Who?"}, ("Ann", "Ann B"), "Ann"),
            ({"question": "Why?"}, ("",), "unanswerable"),
        ],
    ),
    (
        ExtractiveQA,
        {"language": "zh"},
        "a.jsonl",
        {"context": "他走了", "question": "谁？", "answers": {"text": [], "answer_start": []}},
        [({"no_answer": "无法回答"}, ("",), "无法回答")],
    ),
    (
        OpenQA,
        {},
        "a.jsonl",
        {"question": "Who?", "answer": {"value": "Ann", "aliases": ["A", "Ann"]}},
        [({"context": ""}, ("Ann", "A"), "Ann")],
    ),
    (
        OpenQA,
        {"passages": "found"},
        "a.jsonl",
        {"question": "Who?", "answer": ["Ann"], "found": ["x", {"text": "y", "title": "Z"}]},
        [({"context": "[1] x\n\n[2] Z: y\n\n"}, ("Ann",), "Ann")],
    ),
    (
        Summarization,
        {},
        "a.json",
        [{"id": "1", "dialogue": "A: hi", "summary": "A greets."}],
        [({"document": "A: hi"}, ("A greets.",), "A greets.")],
    ),
    (
        Summarization,
        {"document": "turns"},
        "a.jsonl",
        {"turns": [{"speaker": "A", "text": "hi"}], "summary": ["s", "t"]},
        [({"document": "A: hi"}, ("s", "t"), "s")],
    ),
    (
        Summarization,
        {"longest": 3},
        "a.jsonl",
        {"article": "one two\nthree four", "highlights": "s"},
        [({"document": "one two\nthree"}, ("s",), "s")],
    ),
    (
        QuerySummarization,
        {},
        "a.jsonl",
        MEETING,
        [
            ({"document": "X: tea\nY: milk", "query": "all?"}, ("both",), "both"),
            ({"document": "Y: milk", "query": "Y?"}, ("milk.",), "milk."),
        ],
    ),
    (
        QuerySummarization,
        {},
        "a.jsonl",
        {"article": "x y", "query": "q", "summary": "s"},
        [({"document": "x y", "query": "q"}, ("s",), "s")],
    ),
    (
        TextClassification,
        {},
        "a.tsv",
        'fine\t1\nbad , "this"\t0\n',
        [
            ({"text": "fine", "labels": "negative or positive"}, ("positive",), "positive"),
            ({"text": 'bad , "this"'}, ("negative",), "negative"),
        ],
    ),
    (
        TextClassification,
        {"labels": ("yes", "no"), "values": ("e", "c"), "text": "p", "pair": "h", "about": "relation"},
        "a.jsonl",
        {"p": "a", "h": "b", "label": "c"},
        [({"text": "a\nb", "about": "relation"}, ("no",), "no")],
    ),
    (
        TextClassification,
        {
            "labels": ("no", "yes"),
            "label": "answer",
            "pair": "passage",
            "text": "question",
            "about": "answer",
        },
        "a.jsonl",
        {"question": "q", "passage": "p", "answer": True},
        [({"text": "q\np"}, ("yes",), "yes")],
    ),
    (
        Entities,
        {"tag_names": ("O", "B-PER", "I-PER"), "words": "words"},
        "a.jsonl",
        {"id": "0", "words": ["Ann", "Bee", "ran"], "ner_tags": [1, 2, 0]},
        [({"text": "Ann Bee ran"}, ("PER: Ann Bee",), "PER: Ann Bee")],
    ),
    (
        Entities,
        {},
        "a.conll",
        CONLL,
        [
            ({"text": "Ann Bee ran to Rome"}, ("PER: Ann Bee\nLOC: Rome",), "PER: Ann Bee\nLOC: Rome"),
            ({"text": "no one"}, ("none",), "none"),
        ],
    ),
    (
        Entities,
        {"language": "zh", "joiner": ""},
        "a.bmes",
        BMES,
        [({"text": "张三来"}, ("NAME: 张三",), "NAME: 张三")],
    ),
    (
        Entities,
        {"types": ("LOC",)},
        "a.jsonl",
        {"tokens": ["Ann", "in", "Rome"], "ner_tags": ["S-PER", "O", "S-LOC"]},
        [({"types": " (LOC)"}, ("LOC: Rome",), "LOC: Rome")],
    ),
    (
        Recommendation,
        {},
        "a.jsonl",
        {"user": "u", "history": ["A", "B"], "candidate": "C", "click": 0},
        [({"history": "A\nB", "candidate": "C"}, ("no",), "no")],
    ),
    (
        Recommendation,
        {
            "user": "userId",
            "candidate": "movieId",
            "click": "rating",
            "time": "timestamp",
            "asked": 2,
            "items": "movies.csv",
        },
        "a.csv",
        RATINGS,
        [
            ({"history": "Alien, 1979", "candidate": "Brazil"}, ("no",), "no"),
            ({"history": "Alien, 1979", "candidate": "Clue"}, ("yes",), "yes"),
        ],
    ),
    (
        Arithmetic,
        {},
        "a.jsonl",
        {"question": "q", "answer": "It is 500*2=<<500*2=1000>>1000.\n#### 1,000"},
        [({"question": "q"}, ("1000",), "It is 500*2=1000.\n#### 1,000")],
    ),
    (
        Arithmetic,
        {"reasoning": False},
        "a.jsonl",
        {"question": "q", "answer": -2.5},
        [({}, ("-2.5",), "-2.5")],
    ),
    (
        MultipleChoice,
        {},
        "a.csv",
        'Which?,red,"a, b",tea,8,C\n',
        [({"question": "Which?", "choices": "A. red\nB. a, b\nC. tea\nD. 8"}, ("C",), "C")],
    ),
    (
        MultipleChoice,
        {},
        "a.jsonl",
        {
            "question": {"stem": "S", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
            "answerKey": "B",
        },
        [({"question": "S"}, ("B",), "B")],
    ),
    (MultipleChoice, {}, "a.jsonl", {"question": "S", "choices": ARC, "answerKey": "1"}, [({}, ("A",), "A")]),
    (
        MultipleChoice,
        {"question": "ctx", "choices": "endings", "answer_with": "text"},
        "a.jsonl",
        {"ctx": "She", "endings": ["ran", "sat"], "label": "1"},
        [({"choices": "A. ran\nB. sat"}, ("sat",), "sat")],
    ),
]


def files(folder: Path, name: str, content: Any) -> tuple[str, ...]:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text, "utf-8")
    return (str(folder / name),)


@pytest.mark.parametrize(("kind", "given", "name", "content", "expected"), CASES)
def test_it_reads_its_files_and_its_own_answers(kind, given, name, content, expected, tmp_path, caplog):
    (tmp_path / "movies.csv").write_text(MOVIES)
    given = given | ({"items": str(tmp_path / "movies.csv")} if "items" in given else {})
    task = kind(validation=files(tmp_path, name, content), **given)
    samples = [sample for _, sample in evaluation_samples(task)]
    assert "not read" not in caplog.text
    assert [(sample.answers, task.target(sample)) for sample in samples] == [(a, t) for _, a, t in expected]
    for sample, (values, answers, learned) in zip(samples, expected, strict=True):
        assert values.items() <= sample.values.items() and sample.values.keys() == set(task.names)
        assert task.extract(learned, sample) == answers[0]
        assert not sample.choices or sample.answers[0] in sample.choices
        for phrasing in (*task.prompts, task.held_out):
            asked = question(task, sample, phrasing)[-1]["content"]
            assert all(value in asked for name, value in sample.values.items() if f"{{{name}}}" in phrasing)


def test_dialogue_learns_what_chat_learns_of_every_layout(tmp_path):
    odd = shutil.copytree(
        Path(__file__).parents[1] / "odd/dialogues", tmp_path / "odd"
    )  # warnings are said once

    def learned(kind: type[Chat | Dialogue], path: Path) -> Any:
        data = kind(train=(str(path),), validation=(str(path),), tokenizer="byte")
        try:
            rows = rows_of(data, ByteTokenizer(), 4096, None, 1)
        except UserError:
            return None
        return [{name: column.tolist() for name, column in rows[i].items()} for i in range(len(rows))]

    paths = sorted(odd.iterdir())
    found = [learned(Chat, path) for path in paths]
    assert sum(one is not None for one in found) > 10
    assert [learned(Dialogue, path) for path in paths] == found


def test_every_task_is_tested_and_documented_with_its_metrics():
    assert {kind.__name__ for kind, *_ in CASES} == set(tasks.__all__)
    page = (Path(__file__).parents[2] / "docs/tasks.md").read_text("utf-8")
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `(\w+)` \|.*)$", page, re.MULTILINE)}
    for name in tasks.__all__:
        kind = getattr(tasks, name)
        task = kind(validation=("a.jsonl",))
        assert rows[name].split("|")[-2].split(", ") == [" " + task.metrics[0], *task.metrics[1:-1],
                                                        task.metrics[-1] + " "]  # fmt: skip
        assert task.metrics[0] in METRICS or "@" in task.metrics[0]
        own = {field.name for field in fields(kind)} - {field.name for field in fields(Task)}
        said = [field for field in own if f"`{field}" not in page]
        assert not said, (name, said)
    assert set(METRICS) <= set(re.findall(r"`([\w@]+)`", page.replace("@K", "@10")))


@pytest.mark.parametrize("kind", [getattr(tasks, name) for name in tasks.__all__], ids=tasks.__all__)
def test_a_phrasing_is_held_out_in_every_language(kind):
    for language in ("en", "zh") if kind.phrasings else ("en",):
        task = kind(train=("a",), language=language)
        assert task.held_out not in task.prompts or kind in (Dialogue, Support)
        assert not kind.phrasings or len(task.prompts) >= 2
        if kind.phrasings:  # they follow the language, unless they are somebody's own
            other = kind(train=("a",), prompts=task.prompts, held_out=task.held_out, language="en")
            assert other.prompts == kind.phrasings["en"][:-1] and other.held_out == kind.phrasings["en"][-1]
            mine = "{" + task.names[0] + "} ?"
            assert kind(train=("a",), prompts=(mine,), language=language).prompts == (mine,)


def test_entities_are_scored_as_seqeval_scores_tags(tmp_path):
    """Predicted tags, written as the task writes them and read back, have the F1 of the tags themselves."""
    from seqeval.metrics import f1_score

    draw = random.Random(0)
    letters = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    task, gold, made = Entities(test=("a",)), list[list[str]](), list[list[str]]()
    for part in (gold, made):
        part += [list(to_bio(draw.choices(letters, k=9), "bio")) for _ in range(40)]
    mixed = [
        [a if draw.random() < 0.7 else b for a, b in zip(*pair, strict=True)]
        for pair in zip(gold, made, strict=True)
    ]
    made = [to_bio(tags, "bio") for tags in mixed]
    words = [[f"w{i}-{j}" for j in range(9)] for i in range(40)]

    def written(tags: list[str], i: int) -> Sample:
        return next(task.samples({"tokens": words[i], "ner_tags": list(tags)}))

    predictions = [
        Prediction(sample, "", said, task.extract(said, sample))
        for i in range(40)
        for sample, said in [(written(gold[i], i), task.target(written(made[i], i)))]
    ]
    metric = METRICS["entity_f1"]
    assert metric.of(metric.statistics(predictions)) == pytest.approx(100 * f1_score(gold, made))


def test_labels_count_each_and_answers_to_one_question_together(tmp_path):
    path = files(tmp_path, "a.tsv", "fine\t1\nfine\t1\nfine\t0\n")
    counted = [s.answers for _, s in evaluation_samples(TextClassification(test=path), "test")]
    assert counted == [("positive",), ("positive",), ("negative",)]
    merged = evaluation_samples(Translation(test=path), "test")
    assert [sample.answers for _, sample in merged] == [("1", "0")]


SAMPLE = Sample({}, ("A",), choices=("A", "B", "C"), facts={"texts": ["red", "blue", "A cat"]})


@pytest.mark.parametrize(
    ("task", "sample", "said", "answer"),
    [
        (MultipleChoice, SAMPLE, "B", "B"),
        (MultipleChoice, SAMPLE, "(C) because", "C"),
        (MultipleChoice, SAMPLE, "The answer is B.", "B"),
        (MultipleChoice, SAMPLE, "A cat", "C"),
        (MultipleChoice, SAMPLE, "Blue.", "B"),
        (MultipleChoice, SAMPLE, "答案是B", "B"),
        (MultipleChoice, SAMPLE, "I do not know", ""),
        (MultipleChoice, SAMPLE, "D", ""),
        (Arithmetic, Sample({}), "2 + 2 = 4. The answer is 4 apples, not 5", "4"),
        (Arithmetic, Sample({}), "so $1,234.50", "1234.50"),
        (Arithmetic, Sample({}), "The answer is unknown.", ""),
        (Arithmetic, Sample({}), "#### -3", "-3"),
        (TextClassification, Sample({}, choices=("negative", "positive")), " Positive!", "positive"),
        (TextClassification, Sample({}, choices=("negative", "positive")), "it is negative .", "negative"),
        (TextClassification, Sample({}, choices=("negative", "positive")), "positive or negative", ""),
        (TextClassification, Sample({}, choices=("negative", "positive")), "unpositive", ""),
        (ExtractiveQA, Sample({}), " Unanswerable. ", ""),
        (ExtractiveQA, Sample({}), " the cat ", "the cat"),
        (Entities, Sample({}), "PER: Ann\nnonsense\nLOC： Rome\n", "PER: Ann\nLOC: Rome"),
        (Entities, Sample({}), "None.", "none"),
        (Entities, Sample({}), "Ann and Rome", ""),
        (Recommendation, Sample({}, choices=("yes", "no")), "Yes.", "yes"),
        (Recommendation, Sample({}, choices=("yes", "no")), "maybe", ""),
    ],
)
def test_answers_are_read_from_what_is_written(task, sample, said, answer):
    assert task(train=("a",)).extract(said, sample) == answer


@pytest.mark.parametrize(
    ("kind", "given", "record", "words"),
    [
        (DataToText, {}, {"mr": "a", "reff": "b"}, "no field 'ref'; did you mean 'reff'"),
        (Summarization, {}, {"doc": "a", "summary": "b"}, "it has none of dialogue, .* but doc, summary;"),
        (TextClassification, {}, {"text": "a", "label": "2"}, "label '2' is not one of data.labels"),
        (TextClassification, {}, {"text": "", "label": "1"}, "field 'text' is empty"),
        (ExtractiveQA, {}, {"context": "a", "question": "b", "answers": 3.5, "is_impossible": False}, ""),
        (
            ExtractiveQA,
            {},
            {"context": "a", "question": "b", "answers": [], "is_impossible": False},
            "no answer, but",
        ),
        (OpenQA, {}, {"question": "b", "answer": []}, "holds no answer"),
        (
            Entities,
            {},
            {"tokens": ["a"], "ner_tags": [3]},
            "holds numbers; name what they mean with data.tag_names",
        ),
        (
            Entities,
            {"tag_names": ("O",)},
            {"tokens": ["a"], "ner_tags": [-1]},
            "holds -1, but data.tag_names are 1",
        ),
        (Entities, {}, {"tokens": ["a", "b"], "ner_tags": ["O"]}, "2 words have 1 tags"),
        (Recommendation, {}, {"user": 1, "history": "a", "candidate": "b", "click": 3}, "'click' is 3"),
        (Arithmetic, {}, {"question": "q", "answer": "none"}, "has no number"),
        (
            MultipleChoice,
            {},
            {"question": "q", "choices": ["a", "b"], "answer": 2},
            "'2', which is none of its 2",
        ),
        (MultipleChoice, {}, {"question": "q", "choices": ["a", "a"], "answer": 0}, "different ones"),
        (Dialogue, {}, {"text": "a"}, "no known shape"),
    ],
)
def test_records_that_do_not_fit_are_refused_with_a_reason(kind, given, record, words, tmp_path):
    task = kind(validation=files(tmp_path, "a.jsonl", record), **given)
    if words:
        with pytest.raises(UserError, match=words):
            evaluation_samples(task)
    else:
        assert evaluation_samples(task)[0][1].answers == ("3.5",)


def test_questions_on_one_passage_are_held_out_together(tmp_path):
    lines = [{"context": f"p{i}", "question": f"q{j}", "answers": ["a"]} for i in range(20) for j in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    task = ExtractiveQA(train=(str(path),), validation_fraction=0.3)
    kept, held = (
        {s.values["passage"] for _, s in evaluation_samples(task, part)} for part in ("train", "validation")
    )
    assert len(held) == 6 and len(kept) == 14 and not kept & held


def test_pairs_that_share_a_side_are_held_out_together_in_both_directions(tmp_path):
    pairs = [("a", "1"), ("b", "1"), ("b", "2"), ("c", "3"), ("d", "4"), ("e", "5"), ("f", "5")]
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    shared = {"train": (str(path),), "header": ("en", "zh"), "validation_fraction": 0.5}
    there, back = Translation(**shared), Translation(**shared, source="zh", into="en")
    held = [{s.values["text"] for _, s in evaluation_samples(task)} for task in (there, back)]
    assert {b for a, b in pairs if a in held[0]} == held[1]
    assert len(held[0] & {"a", "b"}) in (0, 2) and len(held[0] & {"e", "f"}) in (0, 2)


def test_fields_that_nobody_reads_are_named_and_those_that_matter_refused(tmp_path, caplog):
    record = {"question": "q", "answer": "1", "hint": "x", "id": 3}
    evaluation_samples(Arithmetic(validation=files(tmp_path, "a.jsonl", record)))
    assert "a.jsonl: not read, so that nothing of it is learned: field 'hint' (1)" in caplog.text
    with pytest.raises(UserError, match="field 'images' would change what is learned"):
        evaluation_samples(Arithmetic(validation=files(tmp_path, "b.jsonl", record | {"images": ["x"]})))


def test_ways_to_ask_are_spread_over_samples():
    task = Arithmetic(train=("a",))
    asked = [phrasing_of(task, Sample({"question": f"{i}"}, ("1",)), "train") for i in range(300)]
    assert all(60 < asked.count(way) < 140 for way in task.prompts)
