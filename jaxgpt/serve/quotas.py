"""Rates of requests and quotas of tokens for each key: in memory for one process, in Redis for several.

A request is admitted with the most tokens that it may use, which are set aside at once, and settled with
those that it did use. So a quota is never exceeded, however many requests run at a time.
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


class Admission(NamedTuple):
    """Whether a request may run, and what is left of its key's limits.

    Attributes:
      limit: `requests` or `tokens`, of which there are too few; empty where the request may run.
      seconds: after which it may; 0 where that is now. A request that asks for more tokens than a day has
        never may: infinity.
      requests_left, tokens_left: of this minute and day; None without a limit.
      tokens: set aside for it.
      day: of which they are, in days since 1970.
    """

    limit: str
    seconds: float
    requests_left: int | None
    tokens_left: int | None
    tokens: int
    day: int


class Limits(Protocol):
    """Counts requests and tokens of keys."""

    async def admit(self, key: Key, tokens: int) -> Admission:
        """Count a request and set aside its tokens, or neither if one of the limits is reached."""
        ...

    async def settle(self, key: Key, admission: Admission, used: int) -> None:
        """Give back those tokens of an admitted request that it did not use."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def _left(key: Key, requests: int, tokens: int) -> tuple[int | None, int | None]:
    """What is left of limits of which so much is used."""
    return (
        max(0, key.requests_per_minute - requests) if key.requests_per_minute else None,
        max(0, key.tokens_per_day - tokens) if key.tokens_per_day else None,
    )


def _wait_for_tokens(key: Key, tokens: int, now: float) -> float:
    return math.inf if tokens > key.tokens_per_day else DAY - now % DAY


@dataclass
class _Count:
    times: deque[float] = field(default_factory=deque)
    day: int = 0
    tokens: int = 0


@dataclass
class MemoryLimits:
    """Limits of one process; they start anew with it.

    Attributes:
      clock: seconds since 1970.
    """

    clock: Callable[[], float] = time.time
    _counts: dict[str, _Count] = field(default_factory=dict)

    async def admit(self, key: Key, tokens: int) -> Admission:
        """As `Limits`."""
        now = self.clock()
        day, count = int(now // DAY), self._counts.setdefault(key.id, _Count())
        if count.day != day:
            count.day, count.tokens = day, 0
        while count.times and count.times[0] <= now - MINUTE:
            count.times.popleft()
        limit, seconds = "", 0.0
        if key.requests_per_minute and len(count.times) >= key.requests_per_minute:
            limit, seconds = "requests", count.times[-key.requests_per_minute] + MINUTE - now
        elif key.tokens_per_day and count.tokens + tokens > key.tokens_per_day:
            limit, seconds = "tokens", _wait_for_tokens(key, tokens, now)
        else:
            count.tokens += tokens
            if key.requests_per_minute:
                count.times.append(now)
        return Admission(limit, seconds, *_left(key, len(count.times), count.tokens), tokens, day)

    async def settle(self, key: Key, admission: Admission, used: int) -> None:
        """As `Limits`."""
        count = self._counts[key.id]
        if count.day == admission.day:
            count.tokens += used - admission.tokens

    async def close(self) -> None:
        """As `Limits`."""


_ADMIT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local rate, quota, tokens = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local day = math.floor(clock[1] / 86400)
if tonumber(redis.call('HGET', KEYS[2], 'day') or -1) ~= day then
  redis.call('HSET', KEYS[2], 'day', day, 'tokens', 0)
end
redis.call('EXPIRE', KEYS[2], 172800)
local used = tonumber(redis.call('HGET', KEYS[2], 'tokens'))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 60000000)
local requests = redis.call('ZCARD', KEYS[1])
local limit, wait = '', 0
if rate > 0 and requests >= rate then
  limit = 'requests'
  wait = redis.call('ZRANGE', KEYS[1], -rate, -rate, 'WITHSCORES')[2] + 60000000 - now
elseif quota > 0 and used + tokens > quota then
  limit = 'tokens'
else
  used = redis.call('HINCRBY', KEYS[2], 'tokens', tokens)
  if rate > 0 then
    redis.call('ZADD', KEYS[1], now, ARGV[4])
    redis.call('EXPIRE', KEYS[1], 61)
    requests = requests + 1
  end
end
return {limit, wait, requests, used, day, tonumber(clock[1])}
"""
_SETTLE = """
if tonumber(redis.call('HGET', KEYS[1], 'day') or -1) == tonumber(ARGV[1]) then
  redis.call('HINCRBY', KEYS[1], 'tokens', ARGV[2])
end
"""


class Unreachable(UserError):
    """The limits cannot be read: no request is admitted meanwhile."""


class RedisLimits:
    """Limits that several processes share, by Redis's own clock; each step is one atomic script.

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
            raise UserError("--redis is no URL of Redis; give one such as redis://localhost:6379/0.") from None
        self._admit = self._client.register_script(_ADMIT)
        self._settle = self._client.register_script(_SETTLE)

    async def admit(self, key: Key, tokens: int) -> Admission:
        """As `Limits`.

        Raises:
          Unreachable: Redis does not answer.
        """
        args = [key.requests_per_minute, key.tokens_per_day, tokens, uuid.uuid4().bytes]
        limit, wait, requests, used, day, now = await self._run(self._admit, _places(key), args)
        seconds = _wait_for_tokens(key, tokens, now) if limit == b"tokens" else wait / 1e6
        return Admission(limit.decode(), seconds, *_left(key, requests, used), tokens, day)

    async def settle(self, key: Key, admission: Admission, used: int) -> None:
        """As `Limits`.

        Raises:
          Unreachable: Redis does not answer; what was set aside stays so until the day ends.
        """
        await self._run(self._settle, _places(key)[1:], [admission.day, used - admission.tokens])

    async def close(self) -> None:
        """As `Limits`."""
        await self._client.aclose()

    async def _run(self, script: Any, places: list[str], args: list[Any]) -> Any:
        from redis.exceptions import RedisError

        try:
            return await script(keys=places, args=args)
        except (RedisError, OSError) as error:
            raise Unreachable(
                f"the limits of keys cannot be read from Redis ({type(error).__name__}); start it, or check --redis."
            ) from None


def _places(key: Key) -> list[str]:
    """Of its requests and tokens; the braces keep both on one node of a cluster."""
    return [f"jaxgpt:{{{key.id}}}:requests", f"jaxgpt:{{{key.id}}}:tokens"]
