"""What one training step eats.

Shapes: B rows of the batch, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed documents (a pytree).

    Attributes:
      tokens_BT: inputs.
      targets_BT: the token that follows each input in the same document.
      weights_BT: share of each target in the loss; 0 on padding, on a document's end, on untrained text.
      segments_BT: 1, 2, ... for the documents of a row, 0 on padding; attention stays within one. In
        rows that go on from batch to batch the numbers do, too.
      positions_BT: 0, 1, ... from the start of each document's piece in the row; of the document
        itself in rows that go on.
      types_BT: kind of text each token belongs to, of a model that tells them apart; None means all 0.
      memory: what a recurrent model keeps of the batch before, [B, ...] arrays; None for others.
    """

    tokens_BT: Int[Array, "B T"]
    targets_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    types_BT: Int[Array, "B T"] | None = None
    memory: Any = None

    @classmethod
    def abstract(cls, rows: int, length: int, sharding: Any = None, *, types: bool = False) -> Batch:
        """A batch of shapes and types alone, to trace or compile with; `types` adds `types_BT`."""

        def make(dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)

        columns = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
        return cls(*map(make, columns), types_BT=make(jnp.int32) if types else None)


class Features(NamedTuple):
    """What a model makes of a batch.

    Attributes:
      x_BTD: final features of every token.
      balance: load-balancing loss of a mixture of experts, weighted, a mean over the layers; else 0.
      memory: what a recurrent model keeps for the next batch, as in `Batch`.
    """

    x_BTD: jax.Array
    balance: jax.Array | float = 0.0
    memory: Any = None
