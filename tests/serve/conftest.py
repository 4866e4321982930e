"""One running engine and one server for the tests that ask them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_serving import serving, tiny_model

from jaxgpt.config import Batching
from jaxgpt.sample.engine import Engine
from jaxgpt.serve.app import make_app
from jaxgpt.serve.service import Service


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine of the tiny model."""
    engine = Engine(tiny_model().generator, Batching(slots=4, page=16, chunk=32, queue=8))
    engine.warm_up()  # else the first requests of a test run into its limits of time
    with engine:
        yield engine


@pytest.fixture(scope="session")
def service(engine: Engine) -> Service:
    """A service with nothing hooked into it."""
    return Service(name="tiny", model=tiny_model(), engine=engine)


@pytest.fixture(scope="session")
def address(service: Service) -> Iterator[str]:
    """A real server of it."""
    with serving(make_app(service)) as url:
        yield url
