"""Who sees whom, and the facts of rows and layers that a layer's call takes.

Shapes: B batch, T queries, S keys, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, kept as its causes so that a kernel can use them directly.

    An array's batch axis may be 1 where rows are alike.

    Attributes:
      q_index_BT, k_index_BS: place of each query and key in its row.
      q_segments_BT, k_segments_BS: document numbers; a query sees its own document only.
      prefix_BS: keys of a prompt, which their whole document sees whatever their place; None for none.
      causal: whether later keys are hidden.
      window: tokens back that a query sees, itself included, 0 means all.
      layout: what is known of the rows before they are seen. `packed`: queries and keys are the same
        tokens, in order, and a document's stand together. `one`: moreover a row is one document,
        with nothing but padding behind it, whose results nobody reads. `any`: nothing.
    """

    q_index_BT: jax.Array
    k_index_BS: jax.Array
    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    prefix_BS: jax.Array | None = None
    causal: bool = field(default=True, metadata={"static": True})
    window: int = field(default=0, metadata={"static": True})
    layout: Literal["any", "packed", "one"] = field(default="any", metadata={"static": True})

    @classmethod
    def of_rows(
        cls,
        segments_BT: jax.Array,
        prefix_BT: jax.Array | None = None,
        *,
        causal: bool = True,
        one: bool = False,
    ) -> Mask:
        """The mask of whole rows, packed or of one document each."""
        index_1T = jnp.arange(segments_BT.shape[1])[None]
        layout = "one" if one else "packed"
        return cls(index_1T, index_1T, segments_BT, segments_BT, prefix_BT, causal, layout=layout)

    def dense(self) -> jax.Array:
        """The mask as booleans [B, T, S] (or [1, T, S] where rows are alike); all see themselves."""
        require(
            self.causal or not self.window,
            "a sliding window needs a causal mask; set model.causal=True or model.windows=().",
        )
        seen_BTS = self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        back_BTS = self.distance()
        if self.causal:
            ahead_BTS = back_BTS < 0
            seen_BTS &= ~ahead_BTS if self.prefix_BS is None else ~ahead_BTS | self.prefix_BS[:, None]
        if self.window:
            seen_BTS &= back_BTS < self.window
        return seen_BTS

    def distance(self) -> jax.Array:
        """How far back each key lies from each query [B, T, S] (or [1, T, S] where rows are alike)."""
        return self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """Where a document starts in packed rows [B, T]; a run of padding counts as one."""
    return jnp.diff(segments_BT, axis=1, prepend=-1) != 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowFacts:
    """What all layers are told of the rows at hand.

    Attributes:
      positions_BT: of the tokens in their documents, for rotary embedding.
      mask: who sees whom, but for the window, which is a layer's.
      real_BT: which tokens are no padding; None where nobody asks.
      start_B: the slots of a cache where the rows' first tokens go; None without a cache, or where it
        is empty.
    """

    positions_BT: jax.Array
    mask: Mask
    real_BT: jax.Array | None = None
    start_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerFacts:
    """In what one layer differs from its neighbours, beside its parameters.

    Attributes:
      frequency_K: of the rotary embedding, on the host where it is a constant; None for none.
      key: of dropout; None for none.
      window: as in `Mask`; static, since a kernel is built for it.
    """

    frequency_K: jax.Array | np.ndarray | None = None
    key: jax.Array | None = None
    window: int = field(default=0, metadata={"static": True})

    def seen(self, rows: RowFacts) -> Mask:
        """Who sees whom in this layer."""
        return replace(rows.mask, window=self.window)
