"""Rates of requests and quotas of tokens for each key: in memory for one process, in Redis for several.

A request is counted when it comes, the most tokens that it may use are set aside before it runs, and those
that it did not use are given back when it ends. So no quota is exceeded, however many run at a time.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jaxgpt.errors import UserError
from jaxgpt.serve.keys import Key

MINUTE, DAY = 60.0, 86400.0


class Standing(NamedTuple):
    """What a key has used of its limits, and whether the request at hand may go on.

    Attributes:
      limit: `requests` or `tokens`, of which there are too few; empty where it may.
      seconds: until it may; infinity where it asks for more tokens than a day has.
      requests: of the last 60 seconds.
      tokens: of this day, those set aside included.
      day: in days since 1970 (UTC), to which tokens are counted.
    """

    limit: str
    seconds: float
    requests: int
    tokens: int
    day: int


class Quotas(Protocol):
    """Counts requests and tokens of keys."""

    async def admit(self, key: Key) -> Standing:
        """Count a request, unless a limit is reached."""
        ...

    async def reserve(self, key: Key, tokens: int) -> Standing:
        """Set tokens aside, unless there are fewer left."""
        ...

    async def add(self, key: Key, tokens: int, day: int) -> None:
        """Add tokens to those of a day, if it is not over; negative ones are given back."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def _until_tomorrow(key: Key, tokens: int, now: float) -> float:
    return math.inf if tokens > key.tokens_per_day else DAY - now % DAY


@dataclass
class _Count:
    times: deque[float] = field(default_factory=deque)
    day: int = 0
    tokens: int = 0


@dataclass
class MemoryQuotas:
    """Counts of one process; they start anew with it.

    Attributes:
      clock: seconds since 1970.
    """

    clock: Callable[[], float] = time.time
    _counts: dict[str, _Count] = field(default_factory=dict)

    async def admit(self, key: Key) -> Standing:
        """As `Quotas`."""
        now, count = self._now(key)
        rate = key.requests_per_minute
        if rate and len(count.times) >= rate:
            return self._standing(count, "requests", count.times[-rate] + MINUTE - now)
        if key.tokens_per_day and count.tokens >= key.tokens_per_day:
            return self._standing(count, "tokens", _until_tomorrow(key, 0, now))
        if rate:
            count.times.append(now)
        return self._standing(count)

    async def reserve(self, key: Key, tokens: int) -> Standing:
        """As `Quotas`."""
        now, count = self._now(key)
        if key.tokens_per_day and count.tokens + tokens > key.tokens_per_day:
            return self._standing(count, "tokens", _until_tomorrow(key, tokens, now))
        count.tokens += tokens
        return self._standing(count)

    async def add(self, key: Key, tokens: int, day: int) -> None:
        """As `Quotas`."""
        _, count = self._now(key)
        if count.day == day:
            count.tokens += tokens

    async def close(self) -> None:
        """As `Quotas`."""

    def _now(self, key: Key) -> tuple[float, _Count]:
        """The time, and the key's counts without what is over."""
        now = self.clock()
        day, count = int(now // DAY), self._counts.setdefault(key.id, _Count())
        if count.day != day:
            count.day, count.tokens = day, 0
        while count.times and count.times[0] <= now - MINUTE:
            count.times.popleft()
        return now, count

    def _standing(self, count: _Count, limit: str = "", seconds: float = 0.0) -> Standing:
        return Standing(limit, seconds, len(count.times), count.tokens, count.day)


_NOW = """
local clock = redis.call('TIME')
local now, day = clock[1] * 1000000 + clock[2], math.floor(clock[1] / 86400)
if tonumber(redis.call('HGET', KEYS[2], 'day') or -1) ~= day then
  redis.call('HSET', KEYS[2], 'day', day, 'tokens', 0)
  redis.call('EXPIRE', KEYS[2], 172800)
end
local used = tonumber(redis.call('HGET', KEYS[2], 'tokens'))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 60000000)
local requests = redis.call('ZCARD', KEYS[1])
local limit, wait = '', 0
local rate, quota = tonumber(ARGV[1]), tonumber(ARGV[2])
"""
"""The key's counts without what is over; `now` and `wait` in microseconds."""
_STANDING = "return {limit, wait, requests, used, day, tonumber(clock[1])}"
_ADMIT = f"""{_NOW}
if rate > 0 and requests >= rate then
  limit = 'requests'
  wait = redis.call('ZRANGE', KEYS[1], -rate, -rate, 'WITHSCORES')[2] + 60000000 - now
elseif quota > 0 and used >= quota then
  limit = 'tokens'
elseif rate > 0 then
  redis.call('ZADD', KEYS[1], now, ARGV[3])
  redis.call('EXPIRE', KEYS[1], 61)
  requests = requests + 1
end
{_STANDING}"""
_RESERVE = f"""{_NOW}
if quota > 0 and used + tonumber(ARGV[3]) > quota then
  limit = 'tokens'
else
  used = redis.call('HINCRBY', KEYS[2], 'tokens', ARGV[3])
end
{_STANDING}"""
_ADD = f"""{_NOW}
if day == tonumber(ARGV[4]) then
  redis.call('HINCRBY', KEYS[2], 'tokens', ARGV[3])
end"""


class Unreachable(UserError):
    """The counts cannot be read: no request is admitted meanwhile."""


class RedisQuotas:
    """Counts that several processes share, by Redis's own clock; each step is one atomic script.

    Args:
      url: such as `redis://host:6379/0`; it may hold a password, and is never shown.

    Raises:
      UserError: no such client, or a URL that is none.
    """

    def __init__(self, url: str) -> None:
        try:
            from redis import asyncio as redis
        except ImportError:
            raise UserError(
                "--redis needs the redis client, which is not installed; run `pip install 'jaxgpt[serve]'`."
            ) from None
        try:
            self._client = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
        except ValueError:
            raise UserError(
                "--redis is no URL of Redis; give one such as redis://localhost:6379/0."
            ) from None
        scripts = (_ADMIT, _RESERVE, _ADD)
        self._admit, self._reserve, self._add = map(self._client.register_script, scripts)

    async def admit(self, key: Key) -> Standing:
        """As `Quotas`.

        Raises:
          Unreachable: Redis does not answer.
        """
        return _standing(key, 0, await self._run(self._admit, key, uuid.uuid4().bytes))

    async def reserve(self, key: Key, tokens: int) -> Standing:
        """As `Quotas`.

        Raises:
          Unreachable: Redis does not answer.
        """
        return _standing(key, tokens, await self._run(self._reserve, key, tokens))

    async def add(self, key: Key, tokens: int, day: int) -> None:
        """As `Quotas`.

        Raises:
          Unreachable: Redis does not answer; what was set aside stays so until the day ends.
        """
        await self._run(self._add, key, tokens, day)

    async def close(self) -> None:
        """As `Quotas`."""
        await self._client.aclose()

    async def _run(self, script: Any, key: Key, *args: Any) -> Any:
        from redis.exceptions import RedisError

        held = [f"jaxgpt:{{{key.id}}}:{what}" for what in ("requests", "tokens")]  # on one node of a cluster
        try:
            return await script(keys=held, args=[key.requests_per_minute, key.tokens_per_day, *args])
        except (RedisError, OSError) as error:
            why = type(error).__name__
            raise Unreachable(
                f"the quotas cannot be read from Redis ({why}); try again, or start it and check --redis."
            ) from None


def _standing(key: Key, tokens: int, said: Any) -> Standing:
    limit, wait, requests, used, day, now = said
    seconds = _until_tomorrow(key, tokens, now) if limit == b"tokens" else wait / 1e6
    return Standing(limit.decode(), seconds, requests, used, day)
