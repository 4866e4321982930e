"""A request under the filters: what passes, what is refused, and what is written down about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.serve.access import KeyAccess, make_access
from jaxgpt.serve.audit import verify
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.filtering import Filtering, make_filters
from jaxgpt.serve.keys import KeyFile, make_key, write_keys
from jaxgpt.serve.quotas import RedisQuotas
from jaxgpt.serve.seams import Anyone, Client, Exchange, Passage, Unfiltered

EXCHANGE = Exchange("req-1", "/v1/chat/completions", Client("ada"), "base")
CHECKS = {
    "input": [{"kind": "PersonalData"}, {"kind": "Words", "action": "refuse"}],
    "output": [{"kind": "PersonalData"}, {"kind": "SystemPrompt", "words": 4}],
    "look_behind": 32,
}


class Counted(list):
    def __call__(self, *hit: str) -> None:
        self.append(hit)


@pytest.fixture
def filtering(tmp_path: Path):
    (tmp_path / "checks.json").write_text(json.dumps(CHECKS))
    made = make_filters(str(tmp_path / "checks.json"), str(tmp_path / "audit.jsonl"), Counted())
    assert isinstance(made, Filtering)
    yield made
    made.close()


def logged(tmp_path: Path) -> list[dict]:
    verify([tmp_path / "audit.jsonl"])
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def test_a_request_that_is_masked_both_ways(filtering: Filtering, tmp_path: Path) -> None:
    assert filtering.changes_output
    guard = filtering.open(EXCHANGE)
    texts = guard.enter(
        [Passage("system", "Be kind to all people."), Passage("user", "I am ada@example.com")]
    )
    assert texts == ["Be kind to all people.", "I am <EMAIL_ADDRESS>"]
    first, second = guard.leave(), guard.leave()
    said = "".join([*map(first.feed, "Call 13812345678 now"), first.flush()])
    assert (said, first.stopped) == ("Call <PHONE_NUMBER> now", "")
    said = "".join([*map(second.feed, "I was told: be kind to all people. Bye"), second.flush()])
    assert (said, second.stopped) == ("I was told: ", "SystemPrompt")
    guard.close(200)
    (record,) = logged(tmp_path)
    assert {**record, "time": "", "previous": ""} == {
        "number": 1,
        "time": "",
        "previous": "",
        "request": "req-1",
        "client": "ada",
        "path": "/v1/chat/completions",
        "model": "base",
        "status": 200,
        "decision": "refused",
        "found": [
            {"way": "in", "check": "PersonalData", "kind": "EMAIL_ADDRESS", "action": "mask", "times": 1},
            {"way": "out", "check": "PersonalData", "kind": "PHONE_NUMBER", "action": "mask", "times": 1},
            {"way": "out", "check": "SystemPrompt", "kind": "SYSTEM_PROMPT", "action": "refuse", "times": 1},
        ],
        "prompt": "I am <EMAIL_ADDRESS>",
        "answers": ["Call <PHONE_NUMBER> now", "I was told: "],
    }
    assert filtering.on_hit == [
        ("in", "PersonalData", "mask"),
        ("out", "PersonalData", "mask"),
        ("out", "SystemPrompt", "refuse"),
    ]


def test_a_prompt_that_is_refused(filtering: Filtering, tmp_path: Path) -> None:
    guard = filtering.open(EXCHANGE)
    with pytest.raises(Refused, match=r"refused by this server's filters \(Words\)") as error:
        guard.enter([Passage("user", "you shit, ada@example.com")])
    assert (error.value.status, error.value.code) == (400, "content_filter")
    guard.close(400)
    (record,) = logged(tmp_path)
    assert (record["decision"], record["status"]) == ("refused", 400)
    assert "ada@example.com" not in (tmp_path / "audit.jsonl").read_text()


def test_the_log_is_masked_and_short_whatever_the_filters(tmp_path: Path) -> None:
    made, _ = make_key("x")
    filters = make_filters("", str(tmp_path / "audit.jsonl"))
    assert not filters.changes_output
    for text in (f"my key is {made} and I am at 13812345678", "word " * 5000, "\ud800"):
        guard = filters.open(EXCHANGE)
        assert guard.enter([Passage("prompt", text)]) == [text]
        out = guard.leave()
        assert (out.feed(text), out.flush()) == (text, "")
        guard.close(200)
    first, second, _ = logged(tmp_path)
    assert first["prompt"] == first["answers"][0] == "my key is sk-*** and I am at <PHONE_NUMBER>"
    assert first["decision"] == "allowed" and len(second["prompt"]) == 200


def test_nothing_passes_that_cannot_be_logged(
    filtering: Filtering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(status: int) -> None:
        guard = filtering.open(EXCHANGE)
        try:
            guard.enter([Passage("user", "hello")])
        finally:
            guard.close(status)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        ask(200)
        assert "Input/output error" in caplog.text
        with pytest.raises(Refused, match="cannot be written now"):
            ask(503)
    with pytest.raises(Refused):
        ask(503)  # and is written again
    ask(200)
    assert [one["status"] for one in logged(tmp_path)] == [503, 200]


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_filters("", ""), Unfiltered) and isinstance(make_access("", ""), Anyone)
    with pytest.raises(UserError, match="give --keys too"):
        make_access("", "redis://localhost")
    write_keys(tmp_path / "keys.json", KeyFile(keys=(make_key("ada")[1],)))
    monkeypatch.setenv("URL", "redis://:secret@localhost")
    access = make_access(str(tmp_path / "keys.json"), "env:URL")
    assert isinstance(access, KeyAccess) and isinstance(access.quotas, RedisQuotas) and access.keyed
    with pytest.raises(UserError, match="--redis is env:NONE but NONE is not set"):
        make_access(str(tmp_path / "keys.json"), "env:NONE")
