"""The attention mask, and the per-row and per-layer inputs of a layer.

Shapes: B batch, T queries, S keys, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import require
from jaxgpt.layers.added import Bottlenecks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, stored as the reasons so that a kernel can use them directly.

    The batch axis of an array may be 1 if all rows are alike.

    Attributes:
      q_index_BT, k_index_BS: position of each query and key in its row.
      q_segments_BT, k_segments_BS: document numbers; a query sees only its own document.
      prefix_BS: keys of a prompt, which the whole document sees regardless of position; None for none.
      causal: whether later keys are hidden.
      window: number of tokens back that a query sees, including itself; 0 means all.
      layout: what is known about the rows statically. `packed`: queries and keys are the same tokens in the
        same order, and the tokens of a document are contiguous. `one`: moreover, a row is one document,
        followed only by padding whose results are not read. `any`: nothing.
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
        """The mask of whole rows, packed or with one document each."""
        index_1T = jnp.arange(segments_BT.shape[1])[None]
        layout = "one" if one else "packed"
        return cls(index_1T, index_1T, segments_BT, segments_BT, prefix_BT, causal, layout=layout)

    def dense(self) -> jax.Array:
        """The mask as booleans [B, T, S] (or [1, T, S] if rows are alike); every token sees itself."""
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
        """Distance back from each query to each key [B, T, S] (or [1, T, S] if rows are alike)."""
        return self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """Where documents start in packed rows [B, T]; a run of padding counts as one document."""
    return jnp.diff(segments_BT, axis=1, prepend=-1) != 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowFacts:
    """Inputs about the current rows, the same for all layers.

    Attributes:
      positions_BT: positions of the tokens in their documents, for rotary embedding.
      mask: the attention mask without the window, which depends on the layer.
      real_BT: which tokens are not padding; None if it is not needed.
      start_B: the cache slots of the rows' first tokens; None without a cache or with an empty one.
      adapters_B: number of each row's adapter where weights hold several; None where they do not.
    """

    positions_BT: jax.Array
    mask: Mask
    real_BT: jax.Array | None = None
    start_B: jax.Array | None = None
    adapters_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerFacts:
    """What differs between layers besides their parameters.

    Attributes:
      frequency_K: of the rotary embedding, on the host if it is a constant; None for none.
      key: of dropout; None for none.
      prefix: more keys and values [P, G, K], which all tokens attend to; None for none.
      adapter: what stands beside the layer's branches (`layers.added`); None for nothing.
      window: as in `Mask`; static, because kernels are built for one window.
    """

    frequency_K: jax.Array | np.ndarray | None = None
    key: jax.Array | None = None
    prefix: tuple[jax.Array, jax.Array] | None = None
    adapter: Bottlenecks | None = None
    window: int = field(default=0, metadata={"static": True})

    def seen(self, rows: RowFacts) -> Mask:
        """The attention mask of this layer."""
        return replace(rows.mask, window=self.window)
