"""What one training step eats.

Shapes: B rows of the batch, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
      extra: named columns beyond these, [B] or [B, T], as an objective asks for them: a preference pair's
        side, a reward, a reference's log-probabilities. 0 on rows of padding.
      memory: what a recurrent model keeps of the batch before, [B, ...] arrays; None for others.
    """

    tokens_BT: Int[Array, "B T"]
    targets_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    types_BT: Int[Array, "B T"] | None = None
    extra: dict[str, Array] = field(default_factory=dict)
    memory: Any = None

    @classmethod
    def abstract(
        cls,
        rows: int,
        length: int,
        sharding: Any = None,
        *,
        types: bool = False,
        extra: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    ) -> Batch:
        """A batch of shapes and types alone, to trace or compile with.

        Args:
          rows, length: B and T.
          sharding: of each array.
          types: whether it has `types_BT`.
          extra: shapes and types of one row's extra columns, [] or [T].
        """

        def make(dtype: Any, shape: tuple[int, ...] = (length,)) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

        columns = map(make, (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32))
        more = {name: make(column.dtype, column.shape) for name, column in (extra or {}).items()}
        return cls(*columns, types_BT=make(jnp.int32) if types else None, extra=more)


class Features(NamedTuple):
    """What a model makes of a batch.

    Attributes:
      x_BTD: final features of every token.
      balance: load-balancing loss of a mixture of experts, weighted, a mean over the layers; else 0.
      memory: what a recurrent model keeps for the next batch, as in `Batch`.
      stats: scalars by name for the log, means over the batch; None where there is nothing to tell.
    """

    x_BTD: jax.Array
    balance: jax.Array | float = 0.0
    memory: Any = None
    stats: dict[str, jax.Array] | None = None
