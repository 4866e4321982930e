"""Programs of these tests run once or twice."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Compiling them well would take most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
