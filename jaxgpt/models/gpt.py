"""The decoder: GPT-2's form and today's from one config (`jaxgpt.config.GPT`).

Shapes: B batch, T length, S cache slots, D width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import GPT, Compute
from jaxgpt.layers.attention import Attention, Mask, Seen, pick_kernel
from jaxgpt.layers.cache import Cache, HeldLayer, cached_layers, slots_of
from jaxgpt.layers.linear import Embedding
from jaxgpt.layers.mlp import MLP
from jaxgpt.layers.moe import Experts, Routing
from jaxgpt.layers.norm import Norm, model_norm
from jaxgpt.layers.position import frequencies
from jaxgpt.layers.residual import dropout, residual
from jaxgpt.layers.stack import run_layers, stacked
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.sharding import constrain
from jaxgpt.target import Target


class Block(nnx.Module):
    """One layer: attention, then the MLP or its experts, each on a residual branch."""

    def __init__(self, key: jax.Array, model: GPT, compute: Compute, target: Target) -> None:
        attention_key, mlp_key = jax.random.split(key)
        both = model.norm_at == "both"
        self.attention_norm = model_norm(model, target)
        self.attention = Attention(attention_key, model, compute, target)
        self.attention_out_norm = model_norm(model, target) if both else None
        self.mlp_norm = model_norm(model, target)
        self.mlp = (Experts if model.moe else MLP)(mlp_key, model, compute, target)
        self.mlp_out_norm = model_norm(model, target) if both else None
        self.rate, self.post, self.target = model.dropout, model.norm_at == "post", target

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        seen: Mask | Seen,
        frequency_K: jax.Array | np.ndarray | None = None,
        *,
        real_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: HeldLayer | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None, HeldLayer | None]:
        """The layer's output, what its routing came to (None where dense), and its cache."""
        keys = (None, None) if key is None else jax.random.split(key)

        def attend(x_BTD: jax.Array) -> tuple[jax.Array, HeldLayer | None]:
            return self.attention(x_BTD, positions_BT, seen, frequency_K, cache, start_B)

        def mix(x_BTD: jax.Array) -> tuple[jax.Array, Routing | None]:
            if isinstance(self.mlp, Experts):
                return self.mlp(x_BTD, real_BT)
            return self.mlp(x_BTD), None

        x_BTD, new = self._branch(x_BTD, attend, self.attention_norm, self.attention_out_norm, keys[0])
        x_BTD, routing = self._branch(x_BTD, mix, self.mlp_norm, self.mlp_out_norm, keys[1])
        return constrain(x_BTD, "batch", "length", "features"), routing, new

    def _branch(
        self,
        x_BTD: jax.Array,
        function: Callable[[jax.Array], tuple[jax.Array, Any]],
        norm: Norm,
        out_norm: Norm | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """`x + function(norm(x))`, or `norm(x + function(x))` where norms come after."""
        y_BTD, extra = function(x_BTD if self.post else norm(x_BTD))
        y_BTD = y_BTD if out_norm is None else out_norm(y_BTD)
        x_BTD = residual(x_BTD, dropout(y_BTD, self.rate, key), self.target)
        return norm(x_BTD) if self.post else x_BTD, extra


def make_blocks(model: GPT, compute: Compute, target: Target, key: jax.Array, *, scanned: bool) -> Any:
    """The layers: stacked for training, or a list for decoding."""

    def make(key: jax.Array) -> Block:
        return Block(key, model, compute, target)

    if scanned:
        return stacked(make, key, model.layers)
    return nnx.List([make(k) for k in jax.random.split(key, model.layers)])


def run_blocks(
    blocks: Any,
    model: GPT,
    compute: Compute,
    target: Target,
    x_BTD: jax.Array,
    batch: Batch,
    key: jax.Array | None,
) -> tuple[jax.Array, Routing | None]:
    """Packed rows through the layers; a key turns dropout on.

    Returns:
      Features before any last norm, and the mean of what the layers' routing came to.
    """
    index_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    alike, per_layer = len(set(model.windows)) <= 1, {"index": jnp.arange(model.layers)}
    window = model.windows[0] if alike and model.windows else 0
    prefix_BT = prompts(batch) if model.prefix else None
    segments_BT = batch.segments_BT
    mask = Mask(index_BT, index_BT, segments_BT, segments_BT, prefix_BT, causal=model.causal, window=window)
    splash = pick_kernel(model, compute, target) == "splash"
    # All rows are indexed alike, so one row of distances does.
    distance_1TT = (index_BT[:1, :, None] - index_BT[:1, None]) if biased(model) else None
    dense_BTT = None if splash else mask.dense()
    if not alike:
        per_layer["window"] = jnp.asarray([model.window(i) for i in range(model.layers)])
    if model.position == "rope":
        per_layer["frequency"] = jnp.asarray(np.stack([frequencies(model, i) for i in range(model.layers)]))
    if key is not None and model.dropout:
        per_layer["key"] = jax.random.split(key, model.layers)

    def call(block: Block, x_BTD: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        if dense_BTT is None:
            seen = mask
        else:
            seen = Seen(dense_BTT if alike else mask.dense(layer["window"]), distance_1TT)
        positions_BT, frequency_K = batch.positions_BT, layer.get("frequency")
        real_BT = segments_BT > 0
        return block(x_BTD, positions_BT, seen, frequency_K, real_BT=real_BT, key=layer.get("key"))[:2]

    x_BTD, routing = run_layers(blocks, x_BTD, per_layer, call, compute, target)
    return x_BTD, jax.tree.map(jnp.mean, routing)


def routed(x_BTD: jax.Array, routing: Routing | None) -> Features:
    """Final features with what `run_blocks` says of their routing."""
    if routing is None:
        return Features(x_BTD)
    stats = {"expert_rounds": routing.rounds, "expert_fill": routing.fill}
    return Features(x_BTD, routing.balance, stats=stats)


def biased(model: GPT) -> bool:
    """Whether positions enter as a bias on the scores."""
    return model.position in ("alibi", "relative")


def prompts(batch: Batch) -> jax.Array:
    """Where a row's tokens belong to a prompt [B, T]: up to the input of a document's first target."""
    trained_BT = batch.weights_BT > 0
    before_BT = jnp.cumsum(trained_BT, axis=1) - trained_BT  # trained targets before this one
    starts_BT = jnp.diff(batch.segments_BT, axis=1, prepend=-1) != 0
    base_BT = jax.lax.cummax(jnp.where(starts_BT, before_BT, 0), axis=1)
    return (before_BT == base_BT) & (batch.segments_BT > 0)


class Decoder(Predictor):
    """A causal language model (bidirectional where `GPT.causal` is False).

    Args:
      model: the architecture.
      compute: types, remat and kernels.
      target: what the program is built for.
      key: for the initial parameters.
      scanned: layers stacked for training (True) or apart for decoding (False); the parameters of
        one form come from the other's by `decoding_params`.
    """

    def __init__(
        self, model: GPT, compute: Compute, target: Target, key: jax.Array, *, scanned: bool = True
    ) -> None:
        self.model, self.compute, self.target = model, compute, target
        keys = jax.random.split(key, 4)
        self.embed = Embedding(keys[0], model.vocab_size, model.width, std=0.02)
        self.position = (
            Embedding(
                keys[1], model.context, model.width, std=0.02, axes=("position", "embed"), role="position"
            )
            if model.position == "learned"
            else None
        )
        self.blocks = make_blocks(model, compute, target, keys[2], scanned=scanned)
        self.norm = None if model.norm_at == "post" else model_norm(model, target)
        self.head = None if model.tied else Embedding(keys[3], model.vocab_size, model.width, std=0.02)

    @property
    def unembedding(self) -> Unembedding:
        """A projection of its own, or the embedding."""
        return Unembedding((self.head or self.embed).weight[...], cap=self.model.logit_softcap)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = self.target.stream_dtype(self.compute)
        x_BTD = self.embed(tokens_BT, dtype)
        if self.model.embed_scale:
            x_BTD = x_BTD * jnp.asarray(self.model.width**0.5, dtype)  # rounded as Gemma does
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT, dtype)
        return constrain(x_BTD, "batch", "length", "features")

    def _last(self, x_BTD: jax.Array) -> jax.Array:
        return (x_BTD if self.norm is None else self.norm(x_BTD)).astype(self.compute.dtype)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Final normalised features of packed rows; a key turns dropout on."""
        model = self.model
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = dropout(self._embed(batch.tokens_BT, batch.positions_BT), model.dropout, embed_key)
        x_BTD, routing = run_blocks(self.blocks, model, self.compute, self.target, x_BTD, batch, layers_key)
        return routed(self._last(x_BTD), routing)

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array, cache: Cache, prefix_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append tokens to every row of the cache and return their features.

        Causality alone keeps rows apart from padding: a slot beyond a row's tokens holds rubbish
        until that row's own token overwrites it, and no query looks past its own slot.

        Args:
          tokens_BT: new tokens of each row.
          start_B: how many tokens each row holds already, the slot of its first new token.
          cache: from `init_cache`.
          prefix_B: first tokens of each row, which see each other under `GPT.prefix`; None later.

        Returns:
          Final features [B, T, D] and the new cache.
        """
        model, slots = self.model, slots_of(cache)
        index_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        ones_BT, slot_BS = jnp.ones_like(index_BT), jnp.arange(slots)[None]
        prefix_BS = slot_BS < prefix_B[:, None] if model.prefix and prefix_B is not None else None
        mask = Mask(index_BT, slot_BS, ones_BT, jnp.ones_like(slot_BS), prefix_BS)
        full_BTS = mask.dense()
        distance_BTS = mask.distance() if biased(model) else None
        per_layer: dict[str, np.ndarray] = {}
        windows_L = np.asarray([model.window(i) for i in range(model.layers)], np.int32)
        if windows_L.min() < slots:
            per_layer["window"] = windows_L
        if model.position == "rope":
            per_layer["frequency"] = np.stack([frequencies(model, i) for i in range(model.layers)])

        def call(
            block: Block, x_BTD: jax.Array, layer: dict[str, Any], held: HeldLayer
        ) -> tuple[jax.Array, HeldLayer | None]:
            seen_BTS = mask.dense(jnp.asarray(layer["window"])) if "window" in layer else full_BTS
            seen, frequency_K = Seen(seen_BTS, distance_BTS), layer.get("frequency")
            x_BTD, _, new = block(x_BTD, index_BT, seen, frequency_K, cache=held, start_B=start_B)
            return x_BTD, new

        x_BTD = self._embed(tokens_BT, index_BT)
        x_BTD, cache = cached_layers(self.blocks, x_BTD, per_layer, cache, call)
        return self._last(x_BTD), cache
