"""The input of one training step.

Shapes: B rows per batch, T tokens per row.
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
      weights_BT: weight of each target in the loss; 0 on padding, at the end of a document, on untrained
      text. segments_BT: 1, 2, ... for the documents of a row, 0 on padding; attention stays within a
      document. In
        rows that continue from batch to batch, the numbers continue too.
      positions_BT: 0, 1, ... from the start of each document's piece in the row; in rows that continue, from
        the start of the document itself.
      types_BT: type of text of each token, for models that distinguish types; None means all 0.
      extra: further named columns, [B] or [B, T], that an objective needs: a preference pair's side, a
        reward, a reference model's log-probabilities. 0 on rows of padding.
      memory: what a recurrent model keeps from the previous batch, [B, ...] arrays; None for other models.
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
        """A batch of shapes and types only, for tracing or compiling.

        Args:
          rows, length: B and T.
          sharding: sharding of every array.
          types: whether the batch has `types_BT`.
          extra: shapes and types of one row's extra columns, [] or [T].
        """

        def make(dtype: Any, shape: tuple[int, ...] = (length,)) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

        columns = map(make, (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32))
        more = {name: make(column.dtype, column.shape) for name, column in (extra or {}).items()}
        return cls(*columns, types_BT=make(jnp.int32) if types else None, extra=more)


class Features(NamedTuple):
    """A model's output for a batch.

    Attributes:
      x_BTD: final features of every token.
      balance: weighted load-balancing loss of a mixture of experts, a mean over the layers; else 0.
      memory: what a recurrent model keeps for the next batch, as in `Batch`.
      stats: scalars by name for the log, means over the batch; None if there are none.
    """

    x_BTD: jax.Array
    balance: jax.Array | float = 0.0
    memory: Any = None
    stats: dict[str, jax.Array] | None = None
