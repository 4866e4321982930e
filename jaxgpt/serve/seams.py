"""Where others hook into a service: who may ask, what may pass, what is known, who watches.

Each seam is a small protocol with a default that does nothing. `app.make_app(service)` takes them from
`service.Service`. Nothing here imports a web framework.

One request is one `Exchange`. In order: `Access.admit`, `Observer.open`, `Filters.open`, `Guard.enter` on its
texts, `Documents.find` on a chat, `Access.reserve`, then for every choice an `Outflow`, and at the end,
whatever happened, `Guard.close`, `Watch.close` and `Access.spend`. Methods that are not `async` and not said
to run in a thread of their own are called on the event loop, and must return soon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

SCOPES = ("generate", "embed", "classify", "tokenize", "metrics")
"""What a key may be good for: completions and chats; embeddings; classes; tokens and scores; numbers."""


@dataclass(frozen=True)
class Client:
    """Who asks.

    Attributes:
      name: of the key, never the key itself; the engine serves names in turn.
      scopes: of `SCOPES`, what it may do.
      headers: sent with the answer, such as what is left of a limit.
    """

    name: str = "anyone"
    scopes: frozenset[str] = frozenset(SCOPES)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """One request, as all seams see it.

    Attributes:
      id: of the request, also in the header `x-request-id`.
      path: such as `/v1/chat/completions`.
      client: who asks.
      model: the name that was asked for.
      adapter: of it, the adapter; empty for none.
      stream: whether the answer is streamed.
      user: what the client calls its own user (`user` or `safety_identifier`), for logs; empty for nothing.
      trace: of the header `traceparent`, so that a span joins its caller's trace; empty for nothing.
    """

    id: str
    path: str
    client: Client
    model: str
    adapter: str = ""
    stream: bool = False
    user: str = ""
    trace: str = ""


class Usage(NamedTuple):
    """What a request cost, in tokens."""

    prompt: int = 0
    completion: int = 0


# --------------------------------------------------------------------------------------- who may ask


class Access(Protocol):
    """Keys, limits and quotas."""

    @property
    def keyed(self) -> bool:
        """Whether a key is needed; a service without keys is bound to this machine alone."""
        ...

    async def admit(self, headers: Mapping[str, str], peer: str, path: str) -> Client:
        """The client of a request.

        Args:
          headers: of the request, names in lower case.
          peer: its address.
          path: what it asks for.

        Raises:
          Refused: 401 no such key, 429 too many requests or tokens (with `retry_after`).
        """
        ...

    async def reserve(self, client: Client, tokens: int) -> None:
        """Set aside the most tokens that a request may use, its prompt's included, before it begins.

        Raises:
          Refused: 429 as `admit`.
        """
        ...

    async def spend(self, client: Client, usage: Usage) -> None:
        """Count the tokens of a request that ended, also one that failed or was cancelled; with the same
        `Client` that `admit` gave. What was reserved and not used is free again.
        """
        ...

    async def close(self) -> None:
        """The service ended."""
        ...


class Anyone:
    """No keys: everyone may do everything."""

    keyed = False

    async def admit(self, headers: Mapping[str, str], peer: str, path: str) -> Client:
        return Client()

    async def reserve(self, client: Client, tokens: int) -> None:
        pass

    async def spend(self, client: Client, usage: Usage) -> None:
        pass

    async def close(self) -> None:
        pass


# --------------------------------------------------------------------------------------- what may pass


class Passage(NamedTuple):
    """A text on its way in."""

    role: str
    """`system`, `user`, `assistant` or `tool` of a chat; `prompt` of a completion; `input` of the others."""
    text: str


class Outflow(Protocol):
    """One answer on its way out, piece by piece; held back is what may still have to be changed."""

    @property
    def stopped(self) -> str:
        """Why the answer must not go on, as a word for logs; empty while it may. It then ends with the
        finish_reason `content_filter`.
        """
        ...

    def feed(self, text: str) -> str:
        """What may be shown now that this text was made; possibly nothing."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class Guard(Protocol):
    """The filters of one request."""

    def enter(self, passages: Sequence[Passage]) -> list[str]:
        """The texts as the model may read them, one each; called once, in a thread of its own.

        Raises:
          Refused: 400 with the code `content_filter`.
        """
        ...

    def leave(self) -> Outflow:
        """The way out of one more choice."""
        ...

    def close(self, status: int) -> None:
        """The request ended with this status (499: its client left); called once, in a thread of its own."""
        ...


class Filters(Protocol):
    """Filters of texts, both ways."""

    @property
    def changes_output(self) -> bool:
        """Whether answers may be changed or cut: token by token log-probabilities are then refused."""
        ...

    def open(self, exchange: Exchange) -> Guard:
        """The filters of one request."""
        ...

    def close(self) -> None:
        """The service ended."""
        ...


class Unfiltered:
    """No filters: everything passes as it is. It is `Filters`, `Guard` and `Outflow` in one."""

    changes_output = False
    stopped = ""

    def open(self, exchange: Exchange) -> Unfiltered:
        return self

    def enter(self, passages: Sequence[Passage]) -> list[str]:
        return [passage.text for passage in passages]

    def leave(self) -> Unfiltered:
        return self

    def feed(self, text: str) -> str:
        return text

    def flush(self) -> str:
        return ""

    def close(self, status: int = 0) -> None:
        pass


# --------------------------------------------------------------------------------------- what is known


class Cited(NamedTuple):
    """What an answer rests on."""

    more: str = ""
    """Marks that go behind it, where it has none itself, such as ` [1]`."""
    citations: Sequence[Mapping[str, Any]] = ()
    """Those of the sources that it names; sent with the answer as `citations`."""


def _uncited(text: str) -> Cited:
    return Cited()


class Knowledge(NamedTuple):
    """What a chat is answered from.

    Attributes:
      messages: the turns with what was found in them.
      sources: what was found, each a JSON object with at least `source`; sent with the answer as `sources`.
      answer: said instead of asking the model, where it is not None.
      cite: what a finished answer rests on.
      about: more fields of the answer's JSON, such as that a person is asked for.
    """

    messages: list[dict[str, Any]]
    sources: Sequence[Mapping[str, Any]] = ()
    answer: str | None = None
    cite: Callable[[str], Cited] = _uncited
    about: Mapping[str, Any] = {}


class Documents(Protocol):
    """Passages that a chat is answered from."""

    def find(self, exchange: Exchange, messages: list[dict[str, Any]]) -> Knowledge:
        """What is known about the last turn of a chat (filtered already); in a thread of its own."""
        ...


class NoDocuments:
    """Nothing is known but what the model learned."""

    def find(self, exchange: Exchange, messages: list[dict[str, Any]]) -> Knowledge:
        return Knowledge(messages)


# --------------------------------------------------------------------------------------- who watches


class Watch(Protocol):
    """One request, watched."""

    def token(self, choice: int) -> None:
        """A token of this choice came from the engine; the first one of all ends the time to first token."""
        ...

    def close(
        self, status: int, usage: Usage, reasons: Sequence[str] = (), error: str = "", filtered: str = ""
    ) -> None:
        """The request ended.

        Args:
          status: of HTTP; 499 where its client left.
          usage: its tokens.
          reasons: the finish_reason of every choice.
          error: the sentence of what was refused or failed; it holds nothing of the request's texts unless
            these are at fault, so it is not for metrics' labels.
          filtered: why filters stopped it, if they did.
        """
        ...


class Observer(Protocol):
    """Metrics, logs and traces; several may watch a service."""

    def open(self, exchange: Exchange) -> Watch:
        """A request that was admitted; its time begins here. Called in the request's own asyncio task."""
        ...

    def refused(self, path: str, status: int, request_id: str) -> None:
        """A request that was refused before it was one: no key, no such path, not JSON, too large."""
        ...

    def close(self) -> None:
        """The service ended; in a thread of its own."""
        ...
