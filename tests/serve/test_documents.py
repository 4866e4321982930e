"""Chats answered from documents: passages before the question, citations, what is unknown, a person asked
for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tiny_serving import tiny_model

from jaxgpt.config import Knowledge
from jaxgpt.errors import UserError
from jaxgpt.sample.request import Emit, Load, Piece, Request
from jaxgpt.serve.app import make_app
from jaxgpt.serve.desk import Desk
from jaxgpt.serve.documents import cite, make_documents
from jaxgpt.serve.service import Service
from jaxgpt.text.retrieve import Passage

RETURNS = "Goods can be returned within thirty days. The parcel label is in the box."
ASKED = "How long can goods be returned?"


class Reciter:
    """An engine that says one text whatever it is asked."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, list[str]()

    def submit(self, request: Request, emit: Emit) -> Any:
        self.asked.append(tiny_model().tokenizer.decode(request.prompt))
        for i, character in enumerate(self.text):
            emit(Piece(1, 0.0, character, "stop" if i == len(self.text) - 1 else None))
        return SimpleNamespace(error="", cancel=lambda: None)

    def load(self) -> Load:
        return Load(*[0] * len(Load._fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "returns.md").write_text(f"# Returning goods\n\n{RETURNS}\n")
    records = [{"title": "Delivery", "text": "Delivery takes two days."}, {"text": "我们的电话是十二。"}]
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    records += [{"text": f"What is the time at which the shop is open on {day}, how long?"} for day in days]
    (docs / "more.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return docs


def client(folder: Path, said: str, **desk: Any) -> tuple[TestClient, Reciter]:
    engine = Reciter(said)
    known = Knowledge(documents=(str(folder),), passages=2, least=0.1)
    documents = make_documents(known, Desk(**desk))
    service = Service(name="tiny", model=tiny_model(), engine=engine, documents=documents)
    return TestClient(make_app(service)), engine


def ask(to: TestClient, text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]} | fields
    answer = to.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(to: TestClient, text: str) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": True}
    lines = to.post("/v1/chat/completions", json=body).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def test_an_answer_is_made_from_passages_and_cites_them(folder: Path) -> None:
    to, engine = client(folder, "within thirty days")
    made = ask(to, ASKED)
    before, _, after = engine.asked[0].partition(f"[1] Returning goods: {RETURNS}\n\n")
    assert after.startswith("[2] more: What") and f"\n\n{ASKED}" in after and "goods" not in before
    message = made["choices"][0]["message"]
    assert message["content"] == "within thirty days [1]"
    (cited,) = message["citations"]
    assert cited["number"] == 1 and cited["title"] == "Returning goods"
    assert cited["source"] == "returns.md:3"  # no path of the server
    assert made["sources"][0]["text"] == RETURNS and made["sources"][0]["number"] == 1
    chunks = streamed(to, ASKED)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == message["content"]
    assert chunks[0]["sources"] == made["sources"]
    assert chunks[-1]["choices"][0]["delta"]["citations"] == message["citations"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_own_marks_stay_and_what_others_parse_gets_none(folder: Path) -> None:
    to, _ = client(folder, "Two days [1] [7].")
    message = ask(to, "How long does delivery take?")["choices"][0]["message"]
    assert message["content"] == "Two days [1] [7]."
    assert [c["title"] for c in message["citations"]] == ["Delivery"]
    to, _ = client(folder, '{"days": "thirty"}')
    message = ask(to, ASKED, response_format={"type": "json_object"})["choices"][0]["message"]
    assert message["content"] == '{"days": "thirty"}' and len(message["citations"]) == 1


def test_what_is_unknown_is_said_without_asking_the_model(folder: Path) -> None:
    to, engine = client(folder, "Paris")
    made = ask(to, "What is the capital of France?")
    assert made["choices"][0]["message"]["content"].startswith("I do not find an answer")
    assert made["unknown"] is True and "sources" not in made and not engine.asked
    assert ask(to, "法国的首都是哪里？")["choices"][0]["message"]["content"].startswith("我手头的资料")
    assert ask(to, "你们的电话是多少？")["sources"][0]["text"] == "我们的电话是十二。"
    chunks = streamed(to, "What is the capital of France?")
    assert chunks[0]["unknown"] is True and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    to, engine = client(folder, "Paris", beyond="model")
    assert ask(to, "What is the capital of France?")["choices"][0]["message"]["content"] == "Paris"
    to, _ = client(folder, "Paris", unknown_reply="No idea.")
    assert ask(to, "Who is Napoleon?")["choices"][0]["message"]["content"] == "No idea."


def test_a_person_is_asked_for(folder: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "hook.py", tmp_path / "out.json"
    script.write_text(f"import sys; open({str(out)!r}, 'w').write(sys.stdin.read())")
    to, engine = client(folder, "x", handover_hook=f"{sys.executable} {script}")
    made = ask(to, "I want to talk to a real person, please")
    assert made["handover"] == {"taken": True} and not engine.asked
    assert "over to a person" in made["choices"][0]["message"]["content"]
    assert json.loads(out.read_text())["messages"][0]["content"].startswith("I want to talk")
    to, _ = client(folder, "x", handover_hook="no-such-command")
    assert ask(to, "转人工")["handover"] == {"taken": False}


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("Can I speak to a human?", True),
        ("connect me with an agent", True),
        ("Put me through to someone", True),
        ("I need a person", True),
        ("请帮我转人工客服", True),
        ("How many people work here?", False),
        ("Is the agent's fee returned?", False),
        ("Does a person need a passport?", False),
        ("这是人工智能吗？", False),
    ],
)
def test_who_asks_for_a_person(text: str, asks: bool) -> None:
    assert Desk().asks_person(text) is asks
    assert not Desk(handover="").asks_person(text)


def test_the_mark_is_of_the_passage_with_most_of_the_words() -> None:
    passages: Sequence[Passage] = [
        Passage("Red and blue.", "a:1", title="A"),
        Passage("Blue or green.", "b:1"),
    ]
    assert cite(passages, "green")[0] == " [2]"
    assert cite(passages, "Blue")[0] == " [1]"  # of a tie the nearer one
    assert cite(passages, "Nothing of that") == ("", [])
    assert cite(passages, "") == ("", [])
    assert cite([], "Blue [1]") == ("", [])


def test_a_desk_whose_words_are_no_expression_is_refused() -> None:
    with pytest.raises(UserError, match="--handover is '\\(', no regular expression"):
        Desk(handover="(")
