"""What the quickstart's text and instructions promise: nothing leaks, nothing is imported."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import quickstart_data
from jaxgpt.files import write_jsonl
from jaxgpt.quickstart_data import (
    SKILLS,
    Corpus,
    corpus,
    instructions,
    is_correct,
    word_pool,
)

BUDGET = 300_000
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("nd", "rk", "lter", "me")]


@pytest.fixture(scope="module")
def small() -> Corpus:
    return corpus(BUDGET)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that makes one file of a made-up installation; nothing else is installed."""
    monkeypatch.setattr(quickstart_data.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])

    def write(name: str, source: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())

    return write


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def user_messages(examples) -> set[str]:
    messages = (m for e in examples for m in e["messages"] if m["role"] == "user")
    return {" ".join(m["content"].lower().split()) for m in messages}


# --- the corpus ---------------------------------------------------------------------------


def test_corpus_is_within_its_budget_and_has_no_document_twice(small):
    size = sum(len(document.encode()) for document in small.documents)
    assert 0.9 * BUDGET < size == small.report["bytes"] <= BUDGET
    assert len(set(small.documents)) == len(small.documents) == small.report["documents"]
    lengths = sorted(map(len, small.documents))
    assert 300 < lengths[len(lengths) // 2] < 3000 and lengths[-1] < 10_000
    letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for d in small.documents for c in d)
    assert letters > 0.85 * size


def test_corpus_is_the_same_in_another_process_which_imports_nothing_it_reads(small):
    script = (
        "import hashlib, json, sys\n"
        "from jaxgpt.quickstart_data import corpus, instructions\n"
        "before = set(sys.modules)\n"
        f"found = corpus({BUDGET})\n"
        "digest = lambda v: hashlib.sha256(json.dumps(v).encode()).hexdigest()\n"
        "made = instructions(found, 300, 60, seed=5)\n"
        "print(json.dumps([digest(found.documents), digest(made), sorted(sys.modules)]))\n"
        "new = {name for name in sys.modules if not name.startswith('_sysconfigdata')} - before\n"
        "assert not new, new\n"
    )
    root = os.path.dirname(os.path.dirname(quickstart_data.__file__))
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    documents, made, modules = json.loads(run.stdout)
    assert documents == digest(small.documents)
    assert made == digest(instructions(small, 300, 60, seed=5))
    assert not {"jax", "numpy", "scipy", "flax", "tkinter", "asyncio"} & set(modules)


def test_reading_cleans_groups_counts_and_skips(install):
    prose = "Return the number of things that are in the box."
    install("lib/good.py", f'"""{prose}"""\nraise SystemExit("was imported")\n')
    install("lib/same.py", f'"""{prose}\n\n"""\n')
    install("lib/broken.py", '"""Say what this is for in a sentence."""\ndef (:\n')
    install("lib/latin.py", b'"""Une phrase fran\xe7aise dans un vieux fichier."""\n')
    install("lib/german.py", '"""Diese Funktion liefert die Anzahl der Dinge, welche man hat."""\n')
    install("lib/test/test_it.py", '"""Check that the tests of the library are left out."""\n')
    install(
        "lib/shop.py",
        '"""Tools to buy and sell in a very small shop."""\n'
        "if True:\n"
        "  class Till:\n"
        '    """A till that holds the coins of the day.\n\n'
        "    Use it like this:\n\n    >>> Till().open()\n    42\n\n"
        "    It is wrapped\n    over two lines.\n"
        '    """\n'
        "    async def close(self):\n"
        '      """Close the till, e.g. at night, count ``coins`` with :func:`add`. Then go."""\n',
    )
    install(
        "lib/pydoc_data/topics.py",
        "topics = {'assert': 'It says what is to be true at this place, or else.'}\n",
    )
    found = corpus(10_000, packages=["absent"])
    assert found.documents == (
        f"# good\n\n{prose}",
        "# shop\n\nTools to buy and sell in a very small shop.\n\n"
        "# shop.Till\n\nA till that holds the coins of the day.\n\n"
        "It is wrapped over two lines.\n\n"
        "# shop.Till.close\n\n"
        "Close the till, e.g. at night, count `coins` with `add`. Then go.",
        "# assert\n\nIt says what is to be true at this place, or else.",
    )
    summaries = {entry.name: entry.summary for entry in found.entries}
    assert summaries["shop.Till"] == "A till that holds the coins of the day."
    assert summaries["shop.Till.close"].endswith("with `add`.")
    assert found.report["unreadable"] == 2 and found.report["files"] == 7
    assert found.report["entries"] == 5


def test_boilerplate_is_kept_a_few_times_only(install):
    extra = "This method is part of the protocol and it is there for all."
    source = "".join(
        f'def f{i}():\n  """{word} is what this function gives to you.\n\n  {extra}"""\n'
        for i, word in enumerate(WORDS[:20])
    )
    install("lib/many.py", source)
    text = "\n".join(corpus(100_000, packages=[]).documents)
    assert text.count(extra) == 3 and all(f"{word} is what" in text for word in WORDS[:20])


def test_packages_follow_the_library_and_a_poor_installation_is_an_error(install):
    install(
        "site/pkg/__init__.py",
        '"""The package that comes after the library."""\nraise SystemExit\n',
    )
    install("site/pkg/_src/core.py", '"""The core of the package, with all that is in it."""\n')
    with pytest.raises(ValueError, match="no documentation"):
        corpus(packages=[])
    names = [entry.name for entry in corpus(packages=["pkg"]).entries]
    assert names == ["pkg", "pkg.core"]


def test_word_pool_is_plain_words_without_those_of_the_questions(small):
    words = word_pool(small.documents)
    assert len(set(words)) == len(words) == 100
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)
    assert not {"list", "word", "and", "the", "numpy"} & set(words)


# --- the skills ---------------------------------------------------------------------------


# How each question is read here: x is its list, w and so on its words. Most just end in a list.
PLAIN = (r"(?:.*?(?:: |\? |word of |part of ))(?P<x>.*?)[?.]?",)
FORMS = {
    "word_after": (
        r"Which word follows (?P<w>\w+) in (?P<x>.*)\?",
        r"In the list (?P<x>.*), what comes right after (?P<w>\w+)\?",
    ),
    "word_before": (
        r"Which word precedes (?P<w>\w+) in (?P<x>.*)\?",
        r"In the list (?P<x>.*), what comes right before (?P<w>\w+)\?",
    ),
    "in_list": (
        r"(?:Yes or no: is|Is) (?P<w>\w+) in (?:the list )?(?P<x>.*)\?",
        r"Does the list (?P<x>.*) contain (?P<w>\w+)\?",
    ),
    "remove_word": (
        r"Remove (?P<w>\w+) from (?P<x>.*)\.",
        r"Leave (?P<w>\w+) out: (?P<x>.*)",
        r"What is left of (?P<x>.*) without (?P<w>\w+)\?",
    ),
    "next_number": (*PLAIN, r"Which number follows (?P<x>.*)\?"),
    "days": (r".* day (?:comes )?(?P<w>after|before) each(?: of these)?: (?P<x>.*?)\??",),
}


def continued(x: list[str]) -> str:
    period = next(p for p in range(1, len(x)) if x[p:] == x[:-p])
    return x[len(x) % period]


POLES = "hot cold fast slow old new high low long short open closed left right up down good bad early"
POLES = (POLES + " late empty full big small").split()
OPPOSITE = {word: POLES[i ^ 1] for i, word in enumerate(POLES)}
ANSWERS = {
    "repeat_words": lambda x, w: x,
    "first_word": lambda x, w: x[:1],
    "last_word": lambda x, w: x[-1:],
    "second_word": lambda x, w: x[1:2],
    "quoted_word": lambda x, w: [word.strip('"') for word in x if word[0] == word[-1] == '"'],
    "word_after": lambda x, w: [x[x.index(w) + 1]],
    "word_before": lambda x, w: [x[x.index(w) - 1]] if x.index(w) else [],
    "in_list": lambda x, w: ["yes" if w in x else "no"],
    "pattern": lambda x, w: [continued(x)],
    "count_words": lambda x, w: [str(len(x))],
    "reverse_words": lambda x, w: list(reversed(x)),
    "remove_word": lambda x, w: [word for word in x if word != w],
    "next_number": lambda x, w: [str(2 * int(x[-1]) - int(x[-2]))],
    "opposites": lambda x, w: [OPPOSITE[word] for word in x],
    "days": lambda x, w: [DAYS[(DAYS.index(d) + (1 if w == "after" else -1)) % 7] for d in x],
    "alphabetical": lambda x, w: sorted(x),
    "first_letters": lambda x, w: [word[0] for word in x],
    "uppercase": lambda x, w: [word.upper() for word in x],
}


def read(skill: str, question: str) -> tuple[list[str], str | None]:
    for form in FORMS.get(skill, PLAIN):
        if match := re.fullmatch(form, question):
            found = match.groupdict()
            return found["x"].split(", "), found.get("w")
    raise AssertionError(f"{skill}: {question}")


@pytest.mark.parametrize("skill", SKILLS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_every_answer_is_right_by_another_reading_of_the_question(skill, seed):
    question, answer, arguments = SKILLS[skill](random.Random(seed), WORDS)
    items, word = read(skill, question)
    assert answer == ", ".join(ANSWERS[skill](items, word))
    assert arguments == sorted(items + ([word] if word else []))


def test_every_skill_varies_its_phrasing_and_its_answer():
    rng = random.Random(0)
    for name, skill in SKILLS.items():
        drawn = [skill(rng, WORDS) for _ in range(300)]
        assert len({re.split(r" |:", question)[0] for question, _, _ in drawn}) >= 2, name
        answers = [answer for _, answer, _ in drawn]
        common = max(map(answers.count, answers))
        assert common < (0.6 if name == "in_list" else 0.5) * len(drawn), name


# --- the examples -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 20_260_724])
def test_nothing_of_the_test_is_in_training_or_validation(small, seed, monkeypatch):
    asked = {}

    class Recorder:
        def __init__(self, skill):
            self.skill, self.level = skill, skill.level

        def __call__(self, rng, words):
            question, answer, arguments = self.skill(rng, words)
            asked[" ".join(question.lower().split())] = (self.skill.name, *arguments)
            return question, answer, arguments

    for name, skill in list(SKILLS.items()):
        monkeypatch.setitem(SKILLS, name, Recorder(skill))
    train, validation, test = instructions(small, 1500, 200, seed)
    assert (len(train), len(validation), len(test)) == (1500, 200, 200)
    messages = [user_messages(examples) for examples in (train, validation, test)]
    assert len(messages[2]) == 200
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not messages[i] & messages[j]
        arguments = [{asked[m] for m in messages[k] if m in asked} for k in (i, j)]
        assert arguments[0] and arguments[1] and not arguments[0] & arguments[1]


def test_validation_asks_about_documentation_that_training_does_not_name(small):
    train, validation, test = instructions(small, 2000, 150)
    named = [
        {
            name.split(".")[-1]
            for example in examples
            for message in example["messages"]
            if message["role"] == "user"
            for name in re.findall("`([^`]+)`", message["content"])
        }
        for examples in (train, validation)
    ]
    assert len(named[0]) > 50 and len(named[1]) > 10 and not named[0] & named[1]
    assert all(e["skill"] in SKILLS for e in test)


def test_the_test_is_balanced_and_training_is_mixed(small):
    train, _, test = instructions(small, 2000, 180)
    counts = [sum(e["skill"] == name for e in test) for name in SKILLS]
    assert set(counts) == {10}
    kinds = {e["skill"] for e in train}
    assert kinds == {*SKILLS, "dialogue", "small_talk", "documentation"}
    assert any("jaxgpt" in e["messages"][1]["content"] for e in train)
    for example in train:
        roles = [message["role"] for message in example["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert (len(roles) > 2) == (example["skill"] == "dialogue") and len(roles) <= 6
        assert all(message["content"].strip() for message in example["messages"])


def test_documentation_answers_are_first_sentences_and_true_modules(small):
    texts = {entry.name: entry.text for entry in small.entries}
    train, _, _ = instructions(small, 2000, 20)
    asked = [e["messages"] for e in train if e["skill"] == "documentation"]
    described = held = 0
    for question, answer in asked:
        name = re.search("`([^`]+)`", question["content"])[1]
        if re.match("Which module|Where do|From which", question["content"]):
            held += 1
            assert f"{answer['content'].strip('`')}.{name}" in texts
            assert small.defined[name] == 1
        else:
            described += 1
            assert texts[name].startswith(answer["content"])
    assert described > 50 and held > 10


def test_examples_follow_the_seed_and_the_chosen_skills(small):
    assert instructions(small, 50, 20, seed=1) == instructions(small, 50, 20, seed=1)
    assert instructions(small, 50, 20, seed=1) != instructions(small, 50, 20, seed=2)
    train, _, test = instructions(small, 200, 20, skills=["first_word", "days"])
    assert {e["skill"] for e in test} == {"first_word", "days"}
    known = {"first_word", "days", "documentation", "small_talk", "dialogue"}
    assert {e["skill"] for e in train} == known


def test_what_cannot_be_had_is_an_error(small):
    with pytest.raises(ValueError, match="frist_word"):
        instructions(small, 10, 10, skills=["frist_word"])
    with pytest.raises(ValueError, match="questions, not 5000"):
        instructions(small, 10, 5000, skills=["days"])
    with pytest.raises(ValueError, match="too poor"):
        instructions(small._replace(documents=("Short.",)), 10, 10)


@given(st.text(), st.text(alphabet=" \n\t"), st.text(alphabet=" \n\t"))
def test_checker_ignores_spaces_around_and_nothing_else(answer, before, after):
    example = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
    assert is_correct(example, before + answer + after)
    assert not is_correct(example, answer.strip() + ".")
    assert is_correct(example, answer.upper()) == (answer.upper().strip() == answer.strip())


def test_jsonl_is_written_whole_or_not_at_all(small, tmp_path):
    path = tmp_path / "train.jsonl"
    train, _, _ = instructions(small, 30, 10)
    write_jsonl(path, train)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == train
    with pytest.raises(TypeError):
        write_jsonl(path, [train[0], {"messages": object()}])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 30
    assert os.listdir(tmp_path) == ["train.jsonl"]
