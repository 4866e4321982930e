"""What a service is made of: a model, its engine, and the seams (`seams.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from jaxgpt import __version__
from jaxgpt.sample.request import Emit, Load, Request
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.seams import Access, Anyone, Documents, Filters, NoDocuments, Observer, Unfiltered

if TYPE_CHECKING:
    from fastapi import APIRouter

    from jaxgpt.api import Model


class Handle(Protocol):
    """A request that an engine works on.

    Attributes:
      error: why it ended with "error".
    """

    error: str

    def cancel(self) -> None:
        """Free what it holds."""
        ...


class Engine(Protocol):
    """What a service needs of `sample.engine.Engine`."""

    def submit(self, request: Request, emit: Emit) -> Handle: ...

    def load(self) -> Load: ...


@dataclass(frozen=True, kw_only=True)
class Service:
    """A model that answers requests.

    Attributes:
      name: of the model in the API.
      model: what it is.
      engine: what generates, running; None for a model that writes no text.
      adapters: names of loaded adapters: each is the model `name:adapter`.
      limits: what is taken at most.
      access, filters, documents, observers: see `seams`.
      routers: more addresses, such as those of the page and of metrics.
      origins: of web pages that may ask (see `origins`).
      hosts: names that requests may call it by (in the header `Host`); none for any.
      open_paths: those that need no key; one that ends with a slash stands for all below it.
    """

    name: str
    model: Model
    engine: Engine | None
    adapters: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Anyone)
    filters: Filters = field(default_factory=Unfiltered)
    documents: Documents = field(default_factory=NoDocuments)
    observers: tuple[Observer, ...] = ()
    routers: tuple[APIRouter, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = ("/", "/page/")

    @property
    def fingerprint(self) -> str:
        """Names what gives the same answer to the same request and seed."""
        return f"jaxgpt-{__version__}-{self.name}-{self.model.step}"
