"""Runs rows through their experts block by block: sparse on every platform.

Rows are grouped into blocks of one expert each, and a loop runs over the blocks. So no row is multiplied by
an expert it did not choose; that would take E / K times the model's work (as XLA's own `ragged_dot` does on
CPUs, GPUs and most TPUs). The length of the loop depends on the data, and JAX cannot differentiate such a
loop. So the backward pass is explicit: it recomputes the hidden activations of each block and differentiates
the block. Hidden activations exist for one block at a time, forward and backward.

Shapes: D hidden size, R rows, E experts per device, S rows per block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Expert = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""One expert: (its weights, rows [S, D], their weights in the sum [S]) -> weighted outputs [S, D]."""


class Rows(NamedTuple):
    """The rows that a device received in one round."""

    x_RD: jax.Array
    expert_R: jax.Array
    """The expert of each row, counted on this device; E if the slot is empty."""
    share_R: jax.Array


class Blocks(NamedTuple):
    """A round's rows as blocks of one expert each; an expert's last block is padded."""

    size: int
    """S."""
    order_R: jax.Array
    """The rows sorted by expert."""
    slot_R: jax.Array
    """Slot of each row among the rows of all blocks."""
    first_E: jax.Array
    """Each expert's first block."""
    last_E: jax.Array
    """The block after each expert's last."""
    start_E: jax.Array
    """Index in `order_R` at which each expert's rows begin."""
    count_E: jax.Array

    @classmethod
    def of(cls, expert_R: jax.Array, experts: int, size: int) -> Blocks:
        """Blocks of `size` rows for rows of these experts."""
        order_R = jnp.argsort(expert_R, stable=True)
        count_E = jnp.bincount(expert_R, length=experts + 1)[:experts]
        blocks_E = -(-count_E // size)
        last_E, start_E = jnp.cumsum(blocks_E), jnp.cumsum(count_E) - count_E
        first_E = last_E - blocks_E
        here_R = jnp.minimum(expert_R, experts - 1)
        slot_R = first_E[here_R] * size + jnp.argsort(order_R) - start_E[here_R]
        slot_R = jnp.where(expert_R < experts, slot_R, 0)
        return cls(size, order_R, slot_R, first_E, last_E, start_E, count_E)

    @property
    def most(self) -> int:
        """Maximum number of blocks."""
        rows = self.order_R.size
        return (rows + min(self.count_E.size, rows) * (self.size - 1)) // self.size

    def block(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A block's expert, its rows [S], and which of them are not padding."""
        expert = jnp.searchsorted(self.last_E, number, side="right")
        at_S = (number - self.first_E[expert]) * self.size + jnp.arange(self.size)
        place_S = jnp.minimum(self.start_E[expert] + at_S, self.order_R.size - 1)
        return expert, self.order_R[place_S], at_S < self.count_E[expert]

    def loop(self, turn: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        """Run `turn` for every nonempty block; the bound is for analysis of the compiled program."""
        bound = jnp.asarray(self.most, self.last_E.dtype)

        def more(state: tuple[jax.Array, Any]) -> jax.Array:
            return state[0] < jnp.minimum(self.last_E[-1], bound)

        def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            return state[0] + 1, turn(*state)

        return jax.lax.while_loop(more, body, (jnp.zeros_like(bound), start))[1]


def run_blocks(expert: Expert, weights: Any, rows: Rows, blocks: Blocks) -> jax.Array:
    """Run every row through its expert [R, D]; the output of an empty slot is garbage."""
    S = blocks.size

    def turn(number: jax.Array, y: jax.Array) -> jax.Array:
        number_E, row_S, here_S = blocks.block(number)
        share_S = jnp.where(here_S, rows.share_R[row_S], 0)
        y_SD = expert(_one(weights, number_E), rows.x_RD[row_S], share_S)
        return jax.lax.dynamic_update_slice_in_dim(y, y_SD, number * S, 0)

    shape = (blocks.most * S, rows.x_RD.shape[-1])
    return blocks.loop(turn, jnp.zeros(shape, rows.x_RD.dtype))[blocks.slot_R]


def run_blocks_back(
    expert: Expert, weights: Any, rows: Rows, blocks: Blocks, dy_RD: jax.Array, dw: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """The backward pass of `run_blocks`.

    Args:
      expert, weights, rows, blocks: as in the forward pass.
      dy_RD: cotangent of the outputs.
      dw: float32 sums of the weight gradients so far.

    Returns:
      The new sums, and the cotangents of the rows' features and weights.
    """
    S = blocks.size

    def turn(number: jax.Array, sums: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, ...]:
        dw, dx, dshare = sums
        number_E, row_S, here_S = blocks.block(number)
        # Rounded weights, cast to float32 so that their gradient is float32; the casts cancel out.
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), _one(weights, number_E))
        share_S = jnp.where(here_S, rows.share_R[row_S], 0)
        _, pull = jax.vjp(expert, wide, rows.x_RD[row_S], share_S)
        one, dx_SD, dshare_S = pull(jnp.where(here_S[:, None], dy_RD[row_S], 0))
        dw = jax.tree.map(lambda total, part: total.at[number_E].add(part), dw, one)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_SD, number * S, 0)
        return dw, dx, jax.lax.dynamic_update_slice_in_dim(dshare, dshare_S, number * S, 0)

    places = blocks.most * S
    start = (dw, jnp.zeros((places, rows.x_RD.shape[-1]), rows.x_RD.dtype), jnp.zeros(places, jnp.float32))
    dw, dx, dshare = blocks.loop(turn, start)
    return dw, dx[blocks.slot_R], dshare[blocks.slot_R]


def _one(weights: Any, number: jax.Array) -> Any:
    """The weights of one expert."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), weights)
