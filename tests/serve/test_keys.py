"""Keys: made once, kept as hashes, told apart, and gone when they are removed."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import typing
from pathlib import Path

import pytest

from jaxgpt.cli import main
from jaxgpt.errors import UserError
from jaxgpt.serve.access import KeyAccess
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.keys import KeyFile, Keys, Scope, make_key, redacted, write_keys
from jaxgpt.serve.quotas import MemoryQuotas, RedisQuotas
from jaxgpt.serve.seams import SCOPES, Usage


def kept(tmp_path: Path, **parts) -> tuple[str, Path]:
    """A key, and the file that keeps it."""
    made, entry = make_key("ada", **parts)
    write_keys(tmp_path / "keys.json", KeyFile(keys=(entry,)))
    return made, tmp_path / "keys.json"


def test_scopes_are_those_of_the_seams() -> None:
    assert typing.get_args(Scope) == SCOPES


def test_a_key_is_found_and_not_kept(tmp_path: Path) -> None:
    made, path = kept(tmp_path)
    keys = Keys(str(path))
    found = keys.look_up(made)
    assert found is not None and found.name == "ada"
    assert made.split("-", 2)[2] not in path.read_text()
    wrong = made[:-1] + ("A" if made[-1] != "A" else "B")
    for other in (wrong, made[:20], "", made + "x", f" {made}", "sk-" + "é" * 9, make_key("ada")[0]):
        assert keys.look_up(other) is None


def test_last_days(tmp_path: Path) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    made, path = kept(tmp_path, expires=str(today))
    assert Keys(str(path)).look_up(made)
    made, path = kept(tmp_path, expires=str(today - datetime.timedelta(days=1)))
    assert Keys(str(path)).look_up(made) is None


def test_keys_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = kept(tmp_path)
    monkeypatch.setenv("JAXGPT_KEYS", path.read_text())
    assert Keys("env:JAXGPT_KEYS").look_up(made)
    monkeypatch.setenv("JAXGPT_KEYS", "{")
    with pytest.raises(UserError, match="env:JAXGPT_KEYS is damaged"):
        Keys("env:JAXGPT_KEYS")
    monkeypatch.delenv("JAXGPT_KEYS")
    with pytest.raises(UserError, match="JAXGPT_KEYS is not set"):
        Keys("env:JAXGPT_KEYS")


def test_changes_are_taken_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("jaxgpt.serve.keys.SECONDS", 0.0)
    made, path = kept(tmp_path)
    keys = Keys(str(path))
    path.write_text("{")
    assert keys.look_up(made)  # a damaged file locks nobody out, and nobody in
    assert "the former keys hold" in caplog.text
    new, entry = make_key("bob")
    write_keys(path, KeyFile(keys=(entry,)))
    assert keys.look_up(new) and keys.look_up(made) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scope": ["embed"]}, "did you mean 'scopes'?"),
        ({"scopes": ["embeds"]}, "did you mean 'embed'?"),
        ({"scopes": []}, "is empty"),
        ({"sha256": "00"}, "no SHA-256"),
        ({"id": "../x"}, "key.id is '../x'"),
        ({"name": "a\nb"}, "printable"),
        ({"expires": "tomorrow"}, "must be a day such as"),
        ({"requests_per_minute": -1}, "between 0 and 1,000,000"),
    ],
)
def test_mistakes_in_a_file_are_told(tmp_path: Path, change: dict, said: str) -> None:
    _, path = kept(tmp_path)
    held = json.loads(path.read_text())
    held["keys"][0] |= change
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match=re.escape(said)):
        Keys(str(path))


def test_a_file_without_keys_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    with pytest.raises(UserError, match="holds no key"):
        Keys(str(tmp_path / "keys.json"))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    assert main(["serve", "keys", "add", "ada", "--keys", path, "--requests-per-minute", "5"]) == 0
    made = capsys.readouterr().out.strip()
    assert main(["serve", "keys", "add", "bob", "--keys", path, "--scopes", "metrics"]) == 0
    bob = capsys.readouterr().out.strip()
    assert Keys(path).look_up(made)
    assert main(["serve", "keys", "list", "--keys", path]) == 0
    listed = capsys.readouterr().out
    assert "ada  generate,embed,classify,tokenize  5 requests a minute" in listed
    assert made not in listed and made.split("-", 2)[2] not in listed
    assert main(["serve", "keys", "add", "ada", "--keys", path]) == 2
    assert "has a key named 'ada'" in capsys.readouterr().err
    assert main(["serve", "keys", "remove", "adda", "--keys", path]) == 2
    assert "did you mean 'ada'?" in capsys.readouterr().err
    assert main(["serve", "keys", "remove", "ada", "--keys", path]) == 0
    assert Keys(path).look_up(made) is None and Keys(path).look_up(bob)
    assert main(["serve", "keys"]) == 2
    assert "serve keys remove" in capsys.readouterr().err


def access(tmp_path: Path, **limits: int) -> tuple[str, KeyAccess]:
    made, path = kept(tmp_path, **limits)
    return made, KeyAccess(Keys(str(path)), MemoryQuotas())


def test_who_sends_a_key_is_admitted(tmp_path: Path) -> None:
    made, door = access(tmp_path, requests_per_minute=2, scopes=("embed",))

    async def steps() -> None:
        for headers in ({}, {"authorization": "Basic x"}, {"authorization": f"Bearer {made}x"}):
            with pytest.raises(Refused) as error:
                await door.admit(headers, "127.0.0.1", "/v1/models")
            assert (error.value.status, error.value.code) == (401, "invalid_api_key")
            assert made not in str(error.value)
        sent = {"authorization": f"Bearer {made}"}
        client = await door.admit(sent, "127.0.0.1", "/v1/embeddings")
        assert (client.name, client.scopes) == ("ada", {"embed"})
        assert client.headers["x-ratelimit-remaining-requests"] == "1"
        assert made not in repr(client)
        await door.admit(sent, "127.0.0.1", "/v1/embeddings")
        with pytest.raises(Refused, match="as many as its key allows; wait 60 seconds") as error:
            await door.admit(sent, "127.0.0.1", "/v1/embeddings")
        assert error.value.status == 429 and error.value.headers["Retry-After"] == "60"

    asyncio.run(steps())


def test_tokens_are_set_aside_and_given_back(tmp_path: Path) -> None:
    made, door = access(tmp_path, tokens_per_day=100)
    sent = {"authorization": f"Bearer {made}"}

    async def steps() -> None:
        first, second = [await door.admit(sent, "", "/") for _ in range(2)]
        await door.reserve(first, 70)
        with pytest.raises(Refused, match="up to 40 tokens but 30 of 100 tokens a day are left") as error:
            await door.reserve(second, 40)
        assert (error.value.status, error.value.code) == (429, "insufficient_quota")
        await door.spend(second, Usage())
        await door.spend(first, Usage(20, 5))
        third = await door.admit(sent, "", "/")
        assert third.headers["x-ratelimit-remaining-tokens"] == "75"
        await door.spend(third, Usage(75, 10))  # one that was not announced counts too
        with pytest.raises(Refused, match="0 of 100 tokens a day are left"):
            await door.admit(sent, "", "/")
        with pytest.raises(Refused, match=r"ask for fewer \(max_tokens\)\.$") as error:
            await door.reserve(third, 101)
        assert "Retry-After" not in error.value.headers

    asyncio.run(steps())


def test_without_quotas_nobody_is_admitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, path = kept(tmp_path, requests_per_minute=1)
    door = KeyAccess(Keys(str(path)), RedisQuotas("redis://:hunter2@127.0.0.1:1/0"))

    async def steps() -> None:
        with pytest.raises(Refused) as error:
            await door.admit({"authorization": f"Bearer {made}"}, "", "/")
        assert error.value.status == 503 and error.value.headers["Retry-After"] == "5"
        await door.close()

    asyncio.run(steps())
    assert "hunter2" not in caplog.text and made not in caplog.text


def test_the_time_of_an_unknown_key_is_like_a_known_ones(tmp_path: Path) -> None:
    """Both hash what was sent and compare once: nothing that is skipped shows."""
    made, path = kept(tmp_path)
    keys, compared = Keys(str(path)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
        for key in (made, make_key("x")[0], "nonsense", ""):
            keys.look_up(key)
    assert compared == [(64, 64)] * 4


def test_logs_show_no_key() -> None:
    made, _ = make_key("ada")
    assert redacted(f"GET /?key={made}&x=1") == "GET /?key=sk-***&x=1"
    assert redacted("a task-list") == "a task-list"
