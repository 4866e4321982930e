"""`jaxgpt serve keys add|list|remove`: the keys of a server, which takes changes within a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.config.bounds import bounded
from jaxgpt.errors import require, require_known
from jaxgpt.lock import owned
from jaxgpt.serve.keys import KeyFile, Quota, Requests, Scope, make_key, read_keys, write_keys

KeyName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@bounded
def add(
    name: KeyName,
    *,
    keys: Path,
    scopes: tuple[Scope, ...] = ("generate", "embed", "classify", "tokenize"),
    requests_per_minute: Requests = 0,
    tokens_per_day: Quota = 0,
    expires: str = "",
) -> None:
    """Make an API key, and print it: this once, since only its hash is kept.

    Args:
      name: whose it is.
      keys: file of keys; made where it is not there.
      scopes: what it opens: completions and chats, embeddings, classes, tokens and scores, or metrics.
      requests_per_minute: most requests in any 60 seconds; 0 for no limit.
      tokens_per_day: most tokens of prompts and answers in a day (UTC); 0 for no limit.
      expires: last day on which it opens anything (YYYY-MM-DD, UTC); empty for no end.

    Raises:
      UserError: there is a key of that name, or the file cannot be read or written.
    """
    with _changing(keys):
        held = read_keys(keys).keys if keys.exists() else ()
        names = [key.name for key in held]
        require(name not in names, f"{keys} has a key named {name!r}; remove that first, or name another.")
        made, entry = make_key(
            name,
            scopes=scopes,
            requests_per_minute=requests_per_minute,
            tokens_per_day=tokens_per_day,
            expires=expires,
        )
        write_keys(keys, KeyFile(keys=(*held, entry)))
    print(made)


def list_(*, keys: Path) -> None:
    """Print the keys' IDs, names, scopes and limits.

    Args:
      keys: file of keys.

    Raises:
      UserError: it cannot be read.
    """
    for key in read_keys(keys).keys:
        limits = (
            f"{key.requests_per_minute or 'any'} requests a minute",
            f"{key.tokens_per_day or 'any'} tokens a day",
            *([f"until {key.expires}"] if key.expires else []),
        )
        print(f"{key.id}  {key.name}  {','.join(key.scopes)}  {', '.join(limits)}")


def remove(name: KeyName, *, keys: Path) -> None:
    """Remove a key; a running server refuses it within a second.

    Args:
      name: whose it is, or its ID.
      keys: file of keys.

    Raises:
      UserError: there is none of that name.
    """
    with _changing(keys):
        held = read_keys(keys).keys
        known = {one for key in held for one in (key.name, key.id)}
        require_known(name, known, f"{keys} has no key {name!r}")
        write_keys(keys, KeyFile(keys=tuple(key for key in held if name not in (key.name, key.id))))


@contextlib.contextmanager
def _changing(keys: Path) -> Iterator[None]:
    """One process at a time changes the file, so that no key is lost."""
    with owned(keys.with_name(f".{keys.name}.changing")):
        yield
