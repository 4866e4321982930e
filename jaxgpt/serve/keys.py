"""API keys: who may ask for what. Only their hashes are kept; a key itself is shown once, when it is made.

A key is `sk-ID-SECRET`: the ID is public and finds the entry, the SECRET has 256 random bits. Guessing that
is hopeless however fast a hash is, so SHA-256 serves, and a slow hash for passwords would only delay
requests.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt.config.bounds import Bounds
from jaxgpt.config.check import check_types, from_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import parse_json, read_json, write_json
from jaxgpt.serve.seams import SCOPES

log = logging.getLogger(__name__)

Scope = Literal["generate", "embed", "classify", "tokenize", "metrics"]
"""What a key opens, see `seams.SCOPES`."""
Requests = Annotated[int, Bounds(0, 10**6)]
Quota = Annotated[int, Bounds(0, 2**53)]
ENVIRONMENT = "env:"
"""Before the name of an environment variable that holds what a file of keys would."""
_FIX = "make a file of keys by `jaxgpt serve keys add NAME --keys FILE`"
_SHAPE = re.compile(r"sk-([0-9a-f]{12})-([\w-]{43})", re.ASCII)
_SECRET = re.compile(r"sk-[\w-]{8,}", re.ASCII)
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
"""Compared with where there is no such key, so that it takes as long."""
SECONDS = 1.0
"""Between looks at whether the file changed: a removed key opens nothing after this."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a file of keys.

    Attributes:
      id: public part of the key; stands in logs, metrics and the audit log.
      name: whose it is.
      sha256: of the whole key, in hexadecimal.
      scopes: what it opens.
      requests_per_minute: most requests in any 60 seconds; 0 for no limit.
      tokens_per_day: most tokens of prompts and answers in a day (UTC); 0 for no limit.
      expires: last day on which it opens anything (YYYY-MM-DD, UTC); empty for no end.
    """

    id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...] = ("generate", "embed", "classify", "tokenize")
    requests_per_minute: Requests = 0
    tokens_per_day: Quota = 0
    expires: str = ""

    def __post_init__(self) -> None:
        check_types(self, "key")
        require(bool(re.fullmatch(r"[0-9a-f]{12}", self.id)), f"key.id is {self.id!r}; {_FIX}.")
        require(
            bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)),
            f"key.sha256 of {self.id} is no SHA-256 in hexadecimal; {_FIX}.",
        )
        require(
            bool(self.name.strip()) and self.name.isprintable() and len(self.name) <= 100,
            f"key.name is {self.name!r:.120}; it must be 1 to 100 printable characters.",
        )
        require(bool(self.scopes), f"key.scopes of {self.name!r} is empty; name some of {', '.join(SCOPES)}.")
        _day(self.expires)

    def expired(self, now: float) -> bool:
        """Whether its last day is over, at a time in seconds since 1970."""
        today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
        return bool(self.expires) and today > datetime.date.fromisoformat(self.expires)


def _day(text: str) -> None:
    try:
        datetime.date.fromisoformat(text or "2000-01-01")
    except ValueError:
        raise UserError(f"key.expires is {text!r}; it must be a day such as 2027-12-31, or empty.") from None


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """What a file of keys holds."""

    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "")
        for what in ("id", "name"):
            held = [getattr(key, what) for key in self.keys]
            twice = sorted({one for one in held if held.count(one) > 1})
            require(not twice, f"keys hold the {what} {twice[:1]} twice; remove one.")


def make_key(name: str, **parts: Any) -> tuple[str, Key]:
    """A new key and its entry."""
    made = f"sk-{secrets.token_hex(6)}-{secrets.token_urlsafe(32)}"
    return made, Key(id=made[3:15], name=name, sha256=_hash(made), **parts)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def from_environment(value: str, flag: str) -> str:
    """What `env:NAME` means; any other value as it is.

    Raises:
      UserError: there is no such variable.
    """
    if not value.startswith(ENVIRONMENT):
        return value
    name = value.removeprefix(ENVIRONMENT)
    require(bool(os.environ.get(name)), f"{flag} is {value} but {name} is not set; set it.")
    return os.environ[name]


def redacted(text: str) -> str:
    """The text without what looks like a key."""
    return _SECRET.sub("sk-***", text)


def read_keys(path: Path) -> KeyFile:
    """The entries of a file.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    return from_json(KeyFile, read_json(path, dict[str, Any], _FIX, once=True), "")


def write_keys(path: Path, entries: KeyFile) -> None:
    """Write a file of entries, whole or not at all."""
    write_json(path, dataclasses.asdict(entries))


@dataclass
class Keys:
    """The keys of a server, read anew when their file changes.

    Args:
      source: a file, or `env:NAME` for an environment variable that holds what a file would.

    Raises:
      UserError: it cannot be read, or holds no key.
    """

    source: str
    _entries: dict[str, Key] = field(default_factory=dict)
    _stamp: tuple[int, ...] = ()
    _looked: float = 0.0

    def __post_init__(self) -> None:
        if self.source.startswith(ENVIRONMENT):
            held = from_environment(self.source, "--keys")
            self._take(from_json(KeyFile, parse_json(held, dict[str, Any], self.source, _FIX, once=True), ""))
        else:
            self._stamp = _stamp(Path(self.source))
            self._take(read_keys(Path(self.source)))
        require(bool(self._entries), f"{self.source} holds no key; {_FIX}.")
        self._looked = time.monotonic()

    def look_up(self, key: str) -> Key | None:
        """The entry of a key; None for one that is unknown, was removed, or is past its last day.

        Its time does not tell how much of the key was right.
        """
        self._refresh()
        shape = _SHAPE.fullmatch(key)
        entry = self._entries.get(shape[1]) if shape else None
        same = hmac.compare_digest(_hash(key), entry.sha256 if entry else _NOBODY)
        return entry if same and entry and not entry.expired(time.time()) else None

    def _take(self, held: KeyFile) -> None:
        self._entries = {key.id: key for key in held.keys}

    def _refresh(self) -> None:
        """Read the file again if it changed; while it cannot be read, the former keys hold."""
        if not self._stamp or time.monotonic() - self._looked < SECONDS:
            return
        self._looked = time.monotonic()
        try:
            stamp = _stamp(Path(self.source))
            if stamp == self._stamp:
                return
            self._take(read_keys(Path(self.source)))
            self._stamp = stamp
            log.info("%s: %d keys", self.source, len(self._entries))
        except UserError as error:
            log.error("the former keys hold: %s", error)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        now = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_FIX}.") from None
    return now.st_ino, now.st_size, now.st_mtime_ns
