"""Limits hold in memory and in a real Redis alike, at any number of requests at a time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.serve.keys import Key, make_key
from jaxgpt.serve.quotas import DAY, MemoryQuotas, Quotas, RedisQuotas, Unreachable

NOON = 20_000 * DAY + DAY / 2


def key(**limits: int) -> Key:
    return make_key("ada", **limits)[1]


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis of its own, on a port that was free."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    folder: Path = tmp_path_factory.mktemp("redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Callable[[], Quotas]:
    if request.param == "memory":
        shared = MemoryQuotas()
        return lambda: shared
    url = request.getfixturevalue("redis_url")
    return lambda: RedisQuotas(url)


def run(make: Callable[[], Quotas], steps: Callable[[Quotas], Awaitable[None]]) -> None:
    async def whole() -> None:
        quotas = make()
        await steps(quotas)
        await quotas.close()

    asyncio.run(whole())


def test_requests_per_minute(make) -> None:
    async def steps(quotas: Quotas) -> None:
        own, other = key(requests_per_minute=3), key(requests_per_minute=3)
        made = [await quotas.admit(own) for _ in range(5)]
        assert [one.limit for one in made] == ["", "", "", "requests", "requests"]
        assert [one.requests for one in made] == [1, 2, 3, 3, 3]
        assert 58 < made[-1].seconds <= 60
        assert not (await quotas.admit(other)).limit  # each key for itself
        free = key()
        assert not any([(await quotas.admit(free)).limit for _ in range(9)])

    run(make, steps)


def test_tokens_per_day(make) -> None:
    async def steps(quotas: Quotas) -> None:
        own = key(tokens_per_day=100)
        first = await quotas.reserve(own, 80)
        assert (first.limit, first.tokens) == ("", 80)
        second = await quotas.reserve(own, 30)
        assert (second.limit, second.tokens) == ("tokens", 80) and 0 < second.seconds <= DAY
        await quotas.add(own, 10 - 80, first.day)  # the first used ten alone
        assert (await quotas.reserve(own, 90)).tokens == 100
        assert (await quotas.admit(own)).limit == "tokens"
        assert (await quotas.reserve(own, 101)).seconds == math.inf
        await quotas.add(own, -100, first.day - 1)  # yesterday's count is over
        assert (await quotas.admit(own)).tokens == 100

    run(make, steps)


def test_no_quota_is_exceeded_at_once(make) -> None:
    """Of 40 requests of 30 tokens at a time, from several clients, 33 fit into 1000."""

    async def steps(_: Quotas) -> None:
        own, servers = key(tokens_per_day=1000, requests_per_minute=35), [make() for _ in range(4)]
        admitted = await asyncio.gather(*(servers[i % 4].admit(own) for i in range(40)))
        assert Counter(one.limit for one in admitted) == {"": 35, "requests": 5}
        made = await asyncio.gather(*(servers[i % 4].reserve(own, 30) for i in range(40)))
        assert Counter(one.limit for one in made) == {"": 33, "tokens": 7}
        for server in servers:
            await server.close()

    run(make, steps)


@given(st.lists(st.floats(0, 90), max_size=60), st.integers(1, 5))
def test_in_no_minute_are_there_more(waits: list[float], rate: int) -> None:
    async def steps() -> None:
        clock = Clock()
        quotas, own, passed = MemoryQuotas(clock), key(requests_per_minute=rate), []
        for wait in waits:
            clock.now += wait
            standing = await quotas.admit(own)
            if not standing.limit:
                passed.append(clock.now)
                continue
            clock.now += standing.seconds  # as long as it says, and no longer
            assert not (await quotas.admit(own)).limit
            passed.append(clock.now)
        for at in passed:
            assert sum(at - 59.999 < other <= at for other in passed) <= rate

    asyncio.run(steps())


def test_a_new_day_begins_anew() -> None:
    async def steps() -> None:
        clock, own = Clock(), key(tokens_per_day=10)
        quotas = MemoryQuotas(clock)
        first = await quotas.reserve(own, 10)
        assert (await quotas.admit(own)).seconds == DAY / 2
        clock.now += DAY / 2
        assert not (await quotas.reserve(own, 10)).limit
        await quotas.add(own, -10, first.day)  # what yesterday's request gives back is of yesterday
        assert (await quotas.admit(own)).limit == "tokens"

    asyncio.run(steps())


def test_a_redis_that_is_gone_is_told_without_its_password() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def steps() -> None:
        quotas = RedisQuotas(f"redis://:hunter2@127.0.0.1:{port}/0")
        with pytest.raises(Unreachable) as error:
            await quotas.admit(key(requests_per_minute=1))
        assert "hunter2" not in str(error.value)
        await quotas.close()

    asyncio.run(steps())
    with pytest.raises(UserError) as error:
        RedisQuotas("http://:hunter2@host")
    assert "hunter2" not in str(error.value)
