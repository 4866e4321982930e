"""The shapes that dialogues come in: from a record of a file to turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxgpt.data.lines import as_object, check_text, field_of
from jaxgpt.data.readers.turns import PREFERENCES, Record, is_turns, left_over, read_turns, take_text
from jaxgpt.text.chat import Dialogue

TURNS = ("messages", "conversations", "conversation")
"""Fields that hold turns."""
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
"""Fields that hold what is asked."""
_ANSWERS = ("output", "completion", "response", "answer", "answers")
KNOWN = "messages, conversations, instruction/output, prompt/completion, question/answer"
"""The commonest shapes, for messages."""


class Shape(NamedTuple):
    """What the records of a file are; made by `shape_of`."""

    name: str
    read: Callable[[Record, list[str]], Any]
    """Takes the fields that it reads out of a record, and adds to the names of what else it finds."""
    named: bool = False
    """Whether the config names the fields."""


def shape_of(record: Any, prompt: str = "", completion: str = "") -> Shape | None:
    """The shape of a record by its fields, or None.

    Args:
      record: JSON value.
      prompt: field of what is given, or a path such as `a.b`; with `completion`, that of the answer, these
        are all that is looked for.
    """
    if prompt:
        fits = isinstance(record, dict) and all(has_field(record, name) for name in (prompt, completion))
        return Shape(f"{prompt}/{completion}", partial(_pair, [prompt], [completion]), True) if fits else None
    if is_turns(record):
        return Shape("list of turns", lambda r, unread: read_turns(r.pop(""), unread, "turns"))
    if not isinstance(record, dict):
        return None
    if name := next((name for name in TURNS if name in record), ""):
        return Shape(name, partial(_conversation, name))
    questions = _questions(record)
    answers = [name for name in _ANSWERS if record.get(name) is not None]
    if not questions or not answers:
        pairs = any(record.get(name) is not None for name in PREFERENCES)  # `left_over` refuses them
        return Shape("preference pairs", lambda r, unread: []) if pairs else None
    return Shape("+".join(questions) + "/" + "+".join(answers), partial(_pair, questions, answers))


def _questions(record: Record) -> list[str]:
    questions = [name for name in QUESTIONS if record.get(name) is not None]
    if len(questions) > 1 and "input" in questions:
        questions.remove("input")  # beside another, it is what that one is about
    return questions


def has_field(record: Record, name: str) -> bool:
    """Whether a record has a field, or what a path leads to."""
    try:
        field_of(record, name)
    except ValueError:
        return False
    return True


def to_dialogue(record: Any, shape: Shape) -> tuple[Dialogue, list[str]]:
    """The dialogue of one record, and what in it nobody read.

    Raises:
      ValueError: it is none, with a short reason.
    """
    unread: list[str] = []
    rest = {"": record} if is_turns(record) else dict(as_object(record))
    turns = shape.read(rest, unread)
    unread += left_over(rest, named=shape.named)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("no assistant turn, so nothing to learn")
    if all(turn.get("learn") is False for turn in answers):
        raise ValueError("no assistant turn is to be trained, so nothing to learn")
    if any(not turn["content"] and "tool_calls" not in turn for turn in answers):
        raise ValueError("an assistant turn is empty")
    return turns, unread


def _conversation(name: str, record: Record, unread: list[str]) -> Dialogue:
    turns = read_turns(field_of(record, name), unread, name)
    del record[name]
    return after_system(record, turns)


def after_system(record: Record, turns: Dialogue) -> Dialogue:
    """The turns behind the record's own system text, if it has one."""
    texts = [text for name in ("system", "system_prompt") if (text := take_text(record, name))]
    if len(texts) + any(turn["role"] == "system" for turn in turns[:1]) > 1:
        raise ValueError("the record has two system texts; leave one")
    return [*({"role": "system", "content": text} for text in texts), *turns]


def _pair(questions: list[str], answers: list[str], record: Record, unread: list[str]) -> Dialogue:
    """The turns of a question and an answer, with what they are about and what was said before."""
    for names in (questions, answers):
        _require_one(names, "data.prompt and data.completion")
    (question,), (answer,) = questions, answers
    asked, given = field_of(record, question), field_of(record, answer)
    for name in (question, answer):
        take_field(record, name)
    turns = _asked(question, asked, record, unread)
    given = _person_said(given, unread) if answer == "answers" else given
    return after_system(record, turns + answer_turns(given, answer, unread))


def _require_one(names: list[str], fields: str) -> None:
    if len(names) > 1:
        raise ValueError(
            f"the record has {' and '.join(names)}, and nothing says which is meant; name the fields "
            f"with {fields}"
        )


def take_field(record: Record, name: str) -> None:
    """Takes a field out of a record, or the one that a path begins with."""
    record.pop(name if name in record else name.replace("[", ".").split(".")[0], None)


def _asked(question: str, asked: Any, record: Record, unread: list[str]) -> Dialogue:
    """The turns of a question alone, with what it is about and what was said before."""
    about = [text for name in ("input", "context") if (text := take_text(record, name))]
    if len(about) > 1:
        raise ValueError("the record has both 'input' and 'context'; leave one")
    turns = history(record)
    if is_turns(asked):
        if about:
            raise ValueError(f"{question!r} is a list of turns, so what it is about cannot stand beside it")
        return turns + given_turns(read_turns(asked, unread, question))
    text = "\n".join(part for part in (check_text(asked, question), *about) if part)
    return [*turns, {"role": "user", "content": text}]


def given_turns(turns: Dialogue) -> Dialogue:
    """Turns of which none is learned."""
    return [turn | {"learn": False} if turn["role"] == "assistant" else turn for turn in turns]


def answer_turns(value: Any, name: str, unread: list[str]) -> Dialogue:
    """An answer: a text, or turns."""
    if is_turns(value):
        return read_turns(value, unread, name)
    return [{"role": "assistant", "content": check_text(value, name)}]


def before_answers(record: Record, prompt: str, unread: list[str]) -> Dialogue:
    """Takes the turns out of a record that stand before answers in fields of their own; it may have none.

    Args:
      record: less the answers.
      prompt: the field of what is given, where it cannot be told by its name.
      unread: names of what nobody reads are added.

    Raises:
      ValueError: they cannot be read.
    """
    questions = [prompt] if prompt else _questions(record)
    name = "" if prompt else next((name for name in TURNS if name in record), "")
    if name:
        return given_turns(_conversation(name, record, unread))
    _require_one(questions, "data.prompt")
    turns = Dialogue()
    for question in questions:
        asked = field_of(record, question)
        take_field(record, question)
        turns = given_turns(_asked(question, asked, record, unread))
    return after_system(record, turns)


def history(record: Record) -> Dialogue:
    """The turns of a field `history`, taken out of the record: pairs of a question and an answer."""
    turns, pairs = Dialogue(), record.pop("history", None) or []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("history is not a list of [question, answer] pairs")
        turns.append({"role": "user", "content": check_text(pair[0], "history")})
        turns.append({"role": "assistant", "content": check_text(pair[1], "history")})
    return turns


# ------------------------------------------------------------------------------------------- SQuAD


def _person_said(answers: Any, unread: list[str]) -> str:
    """The first of SQuAD's answers to a question, in either of its layouts; each is one person's."""
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(texts, list) or not texts:
        raise ValueError("field 'answers' holds no answer; leave the question out, or write what to answer")
    spelled = [check_text(t.get("text") if isinstance(t, dict) else t, "answers") for t in texts]
    unread += ["answers beyond the first"] * (len(set(spelled)) > 1)
    return spelled[0]


def questions_of(record: Any) -> list[Record] | None:
    """The questions of an article of SQuAD, each with its context; None for any other record.

    Raises:
      ValueError: a paragraph has no questions.
    """
    if not isinstance(record, dict) or not isinstance(record.get("paragraphs"), list):
        return None
    made = []
    for paragraph in map(as_object, record["paragraphs"]):
        asked = paragraph.get("qas")
        if not isinstance(asked, list):
            raise ValueError("a paragraph has no list 'qas'")
        around = {name: v for name, v in (record | paragraph).items() if name not in ("paragraphs", "qas")}
        made += [around | as_object(question) for question in asked]
    return made
