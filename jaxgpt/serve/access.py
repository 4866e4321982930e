"""Who may ask: keys and their quotas, as the seam `Access` of a service."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from jaxgpt.errors import require
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.keys import Key, Keys, from_environment
from jaxgpt.serve.quotas import MemoryQuotas, Quotas, RedisQuotas, Standing, Unreachable
from jaxgpt.serve.seams import Access, Anyone, Client, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder(Client):
    """Who holds a key, and the tokens set aside for the request.

    Attributes:
      key: its entry.
      day: of the quota.
      reserved: amounts that were set aside.
    """

    key: Key = field(kw_only=True)
    day: int = field(kw_only=True)
    reserved: list[int] = field(default_factory=list, kw_only=True)


@dataclass(frozen=True)
class KeyAccess:
    """Admits who sends a key, as OpenAI's clients do: `Authorization: Bearer sk-...`.

    Attributes:
      keys: which are known.
      quotas: what was used of them.
    """

    keys: Keys
    quotas: Quotas
    keyed: bool = True

    async def admit(self, headers: Mapping[str, str], peer: str, path: str) -> Client:
        """As `seams.Access`. Why a key is refused is not told apart.

        Raises:
          Refused: 401 no valid key, 429 too many requests or tokens, 503 no quotas can be read.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = self.keys.look_up(given.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refused(
                401,
                "No valid API key was sent; send one that `jaxgpt serve keys add` made as "
                "`Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        try:
            now = await self.quotas.admit(key)
        except Unreachable as error:
            raise _unreachable(error) from None
        self._check(key, now)
        return Holder(key.name, frozenset(key.scopes), _headers(key, now), key=key, day=now.day)

    async def reserve(self, client: Client, tokens: int) -> None:
        """As `seams.Access`.

        Raises:
          Refused: 429 fewer tokens are left, 503 no quotas can be read.
        """
        holder = cast(Holder, client)
        if not holder.key.tokens_per_day:
            return
        try:
            now = await self.quotas.reserve(holder.key, tokens)
        except Unreachable as error:
            raise _unreachable(error) from None
        self._check(holder.key, now, tokens)
        holder.reserved.append(tokens)

    async def spend(self, client: Client, usage: Usage) -> None:
        """As `seams.Access`."""
        holder = cast(Holder, client)
        tokens = sum(usage) - sum(holder.reserved)
        holder.reserved.clear()
        if not holder.key.tokens_per_day or not tokens:
            return
        try:
            await self.quotas.add(holder.key, tokens, holder.day)
        except Unreachable as error:
            log.error("%d tokens of %s were not counted: %s", tokens, client.name, error)

    async def close(self) -> None:
        """Let go of connections."""
        await self.quotas.close()

    def _check(self, key: Key, now: Standing, tokens: int = 0) -> None:
        if now.limit:
            raise Refused(
                429,
                _sentence(key, now, tokens),
                code="rate_limit_exceeded" if now.limit == "requests" else "insufficient_quota",
                retry_after=now.seconds if math.isfinite(now.seconds) else None,
                headers=_headers(key, now),
            )


def make_access(keys: str, redis: str) -> Access:
    """Who may ask a service.

    Args:
      keys: a file of keys, or `env:NAME`; empty for none.
      redis: URL of a Redis where several processes count together, or `env:NAME`; empty for memory.

    Raises:
      UserError: keys cannot be read, or Redis is named without keys, or by no URL.
    """
    if not keys:
        require(not redis, "--redis counts what keys have used; give --keys too, or drop it.")
        return Anyone()
    url = from_environment(redis, "--redis")
    return KeyAccess(Keys(keys), RedisQuotas(url) if url else MemoryQuotas())


def _unreachable(error: Unreachable) -> Refused:
    log.error("%s", error)
    return Refused(503, "The quotas of keys cannot be read now; try again soon.", retry_after=5)


def _sentence(key: Key, now: Standing, tokens: int) -> str:
    if now.limit == "requests":
        return (
            f"{key.name} made {now.requests:,} requests in 60 seconds, as many as its key allows; "
            f"wait {math.ceil(now.seconds)} seconds."
        )
    left = f"{max(0, key.tokens_per_day - now.tokens):,} of {key.tokens_per_day:,} tokens a day are left"
    asked = f"{key.name} asks for up to {tokens:,} tokens but " if tokens else f"{key.name}: "
    if math.isinf(now.seconds):
        return f"{asked}{left}; ask for fewer (max_tokens)."
    fewer = "ask for fewer (max_tokens), or " if tokens else ""
    return f"{asked}{left}; {fewer}wait {math.ceil(now.seconds)} seconds."


def _headers(key: Key, now: Standing) -> dict[str, str]:
    """What is left, by the names of OpenAI's headers."""
    made: dict[str, str] = {}
    for what, most, used in (
        ("requests", key.requests_per_minute, now.requests),
        ("tokens", key.tokens_per_day, now.tokens),
    ):
        if most:
            made[f"x-ratelimit-limit-{what}"] = str(most)
            made[f"x-ratelimit-remaining-{what}"] = str(max(0, most - used))
    return made
