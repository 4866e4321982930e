"""A service from the options of `jaxgpt serve`: model, engine, adapters, and what hooks into it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxgpt.config import ONE_DEVICE, Batching, Knowledge, Mesh, Sampling
from jaxgpt.config.decoding import Weights
from jaxgpt.errors import UserError, require
from jaxgpt.sample.settings import Verify
from jaxgpt.serve.desk import DESK, Desk
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.origins import check_origins

if TYPE_CHECKING:
    from jaxgpt.api import Model
    from jaxgpt.sample.engine import Engine
    from jaxgpt.serve.service import Service

log = logging.getLogger(__name__)

NOTHING = Knowledge()
FLAT = tyro.conf.arg(name="")
"""Gives a group's fields as flags without a prefix."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a service."""

    name: str = ""
    """Of the model in the API; empty for the name of its folder."""
    adapters: tuple[str, ...] = ()
    """LoRA runs tuned from this model, each as NAME=FOLDER: requests name them as MODEL:NAME."""
    checkpoint: str = "best"
    """`best` on validation data, `newest`, or a step number."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of matrix products and activations; None means as the run was trained."""
    weights: Weights = "own"
    """On one CPU device, by_output lays them out so that few rows are fast, after a longer compilation; int8
    also rounds them and the rows that they are multiplied by, about 1 % off per product."""
    verify: Verify = True
    mesh: Mesh = ONE_DEVICE
    """Devices to spread the model over."""
    batching: Annotated[Batching, FLAT] = field(default_factory=Batching)
    """How requests are batched."""
    limits: Annotated[Limits, FLAT] = field(default_factory=Limits)
    """What is taken at most."""
    keys: str = ""
    """File of API keys (`jaxgpt serve keys add`), or env:NAME; empty lets everyone on this machine ask."""
    origins: tuple[str, ...] = ()
    """Of web pages that may ask from a browser, such as https://a.example; with keys also * for all."""
    redis: str = ""
    """URL of a Redis where several servers count what keys use, or env:NAME."""
    filters: str = ""
    """File that says what texts are checked for, both ways."""
    audit: str = ""
    """File of the audit log."""
    known: Annotated[Knowledge, FLAT] = NOTHING
    """What chats are answered from."""
    desk: Annotated[Desk, FLAT] = DESK
    """How it answers where nothing is known, or a person is asked for."""
    otlp: str = ""
    """Address of an OpenTelemetry collector that traces are sent to."""


@contextlib.contextmanager
def open_service(run: str, options: Options) -> Iterator[Service]:
    """A service whose programs are compiled; leaving it waits for what runs.

    Args:
      run: folder of a run or of a Hugging Face model.
      options: how it is served.

    Raises:
      UserError: the options do not fit the model, each other or this machine.
    """
    from jaxgpt.api import load
    from jaxgpt.config.checks import read_checks
    from jaxgpt.serve.access import make_access
    from jaxgpt.serve.documents import make_documents
    from jaxgpt.serve.filtering import make_filters
    from jaxgpt.serve.monitoring import monitor
    from jaxgpt.serve.page import PUBLIC, page_router
    from jaxgpt.serve.service import Service

    name, adapters = options.name or Path(run).resolve().name, _adapters(options.adapters)
    require(":" not in name, f"--name is {name!r}, but a colon comes before an adapter; leave it out.")
    check_origins(options.origins, bool(options.keys))
    access = make_access(options.keys, options.redis)  # before the model, which takes its time
    if options.filters:
        read_checks(Path(options.filters))
    documents = make_documents(options.known, options.desk, options.verify)
    loading = ("checkpoint", "dtype", "weights", "mesh", "verify")
    model = load(run, **{field: getattr(options, field) for field in loading})
    for adapter, folder in adapters.items():
        model.load_adapter(adapter, folder)
    with ExitStack() as stack:
        engine = stack.enter_context(_engine(model, options.batching)) if _writes(model) else None
        watching = monitor(name, [*adapters], engine.load if engine else None, options.otlp)
        for observer in watching.observers:
            stack.callback(observer.close)
        filters = make_filters(options.filters, options.audit, watching.metrics.hit)
        stack.callback(filters.close)
        yield Service(
            name=name,
            model=model,
            engine=engine,
            adapters=(*adapters,),
            limits=options.limits,
            access=access,
            filters=filters,
            documents=documents,
            origins=options.origins,
            observers=watching.observers,
            routers=(watching.router, page_router()),
            open_paths=PUBLIC,
        )


def _writes(model: Model) -> bool:
    return model.config.headed is None and model.config.model.causal


def _adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by the names of their adapters."""
    found = dict[str, str]()
    for one in given:
        name, _, folder = one.partition("=")
        require(
            bool(name and folder) and ":" not in name, f"--adapters has {one!r}; write each as NAME=FOLDER."
        )
        require(name not in found, f"--adapters has the name {name!r} twice; give each its own.")
        found[name] = folder
    return found


@contextlib.contextmanager
def _engine(model: Model, batching: Batching) -> Iterator[Engine]:
    """A running engine whose programs are compiled."""
    from jaxgpt.sample.engine import Engine
    from jaxgpt.sample.generate import Generator

    draft = Generator.load(batching.draft) if batching.draft else None
    engine, begun = Engine(model.generator, batching, draft), time.monotonic()
    engine.warm_up()
    with engine:
        try_out(engine, model)
        log.info("compiled in %.1f s", time.monotonic() - begun)
        yield engine


def try_out(engine: Engine, model: Model) -> None:
    """Let an engine answer once.

    Raises:
      UserError: it fails.
    """
    from jaxgpt.sample.request import Piece, Request

    done, ends = threading.Event(), list[str]()

    def emit(piece: Piece) -> None:
        if piece.finish_reason is not None:
            ends.append(piece.finish_reason)
            done.set()

    prompt = model.generator.texts([""])["prompts"][0]
    handle = engine.submit(Request(prompt=prompt, max_new_tokens=2, sampling=Sampling()), emit)
    done.wait()
    if ends == ["error"]:
        raise UserError(f"the model cannot answer ({handle.error or 'its engine failed'}); look at the log.")
