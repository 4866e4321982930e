"""The seam at which what enters a model can be changed: the embeddings of its tokens.

`perturbing` is open while a program is traced; then every table of tokens passes what it looked up through
the function. With none open the program is the same as if there were no such seam. Noise on embeddings,
adversarial training and attributions to tokens are such functions.

Shapes: B batch, T length, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

Change = Callable[[jax.Array], jax.Array]
"""From the embeddings x_BTD of a batch's tokens, as their table has them, to those that enter the model."""

_OPEN: ContextVar[Change | None] = ContextVar("perturbing", default=None)


@contextlib.contextmanager
def perturbing(change: Change | None) -> Iterator[None]:
    """Change the embeddings of tokens in what is traced inside, after what is open already; None changes
    nothing.
    """
    before = _OPEN.get()
    both = change
    if before is not None:
        both = before if change is None else lambda x_BTD: change(before(x_BTD))
    token = _OPEN.set(both)
    try:
        yield
    finally:
        _OPEN.reset(token)


def perturbed(x_BTD: jax.Array) -> jax.Array:
    """What enters the model in the place of these embeddings."""
    change = _OPEN.get()
    return x_BTD if change is None else change(x_BTD)
