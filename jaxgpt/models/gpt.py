"""The decoder: GPT-2's form and today's from one config (`jaxgpt.config.GPT`).

Shapes: B batch, T length, S cache slots, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.attention import Attention, Mask, pick_kernel
from jaxgpt.layers.cache import Cache, LayerCache
from jaxgpt.layers.fusion import pin, stream_dtype
from jaxgpt.layers.linear import Embedding, softcap, unembed
from jaxgpt.layers.mlp import MLP
from jaxgpt.layers.norm import Norm
from jaxgpt.layers.stack import scan_layers, stacked
from jaxgpt.sharding import constrain


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
    """One pre-norm layer: attention, then the MLP, each on a residual branch."""

    def __init__(self, key: jax.Array, model: GPT, compute: Compute) -> None:
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = Norm(model.width, model.norm, model.norm_eps, bias=model.bias)
        self.attention = Attention(attention_key, model, compute)
        self.mlp_norm = Norm(model.width, model.norm, model.norm_eps, bias=model.bias)
        self.mlp = MLP(mlp_key, model, compute)
        self.rate = model.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: Mask | jax.Array,
        *,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_BT, mask, cache, start_B)
        x_BTD = pin(x_BTD + dropout(y_BTD, self.rate, keys[0]))
        x_BTD = pin(x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[1]))
        return constrain(x_BTD, "batch", "length", "features"), cache


class Decoder(nnx.Module):
    """A causal language model.

    Args:
      model: the architecture.
      compute: types, remat and kernels.
      key: for the initial parameters.
      scanned: layers stacked for training (True) or apart for decoding (False); the parameters of
        one form come from the other's by `decoding_params`.
    """

    def __init__(self, model: GPT, compute: Compute, key: jax.Array, *, scanned: bool = True) -> None:
        self.model, self.compute = model, compute
        keys = jax.random.split(key, 4)
        self.embed = Embedding(keys[0], model.vocab_size, model.width, std=0.02)
        self.position = (
            Embedding(keys[1], model.context, model.width, std=0.02, axes=("position", "embed"))
            if model.position == "learned"
            else None
        )

        def make(key: jax.Array) -> Block:
            return Block(key, model, compute)

        if scanned:
            self.blocks = stacked(make, keys[2], model.layers)
        else:
            self.blocks = nnx.List([make(k) for k in jax.random.split(keys[2], model.layers)])
        self.norm = Norm(model.width, model.norm, model.norm_eps, bias=model.bias)
        self.head = None if model.tied else Embedding(keys[3], model.vocab_size, model.width, std=0.02)

    @property
    def unembedding(self) -> jax.Array:
        """The output projection [V, D]."""
        return (self.head or self.embed).weight[...]

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = stream_dtype(jnp.dtype(self.compute.dtype))
        x_BTD = self.embed(tokens_BT, dtype)
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT, dtype)
        return constrain(x_BTD, "batch", "length", "features")

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Final normalised features [B, T, D] of packed rows; a key turns dropout on."""
        model = self.model
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = dropout(self._embed(tokens_BT, positions_BT), model.dropout, embed_key)
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        alike, per_layer = len(set(model.windows)) <= 1, {"index": jnp.arange(model.layers)}
        window = model.windows[0] if alike and model.windows else 0
        mask = Mask(index_BT, index_BT, segments_BT, segments_BT, causal=model.causal, window=window)
        seen = mask if pick_kernel(model, self.compute) == "splash" else mask.dense()
        if not alike:
            per_layer["window"] = jnp.asarray([model.window(i) for i in range(model.layers)])

        def call(block: Block, x_BTD: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
            here = seen if alike else mask.dense(layer["window"])
            return block(x_BTD, positions_BT, here, key=layer.get("key"))[0]

        if layers_key is not None and model.dropout:
            per_layer["key"] = jax.random.split(layers_key, model.layers)
        if isinstance(self.blocks, nnx.List):
            for i, block in enumerate(self.blocks):
                x_BTD = call(block, x_BTD, jax.tree.map(operator.itemgetter(i), per_layer))
        else:
            x_BTD = scan_layers(self.blocks, x_BTD, per_layer, call, self.compute)
        return self.norm(x_BTD).astype(self.compute.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of features [..., D]."""
        return softcap(unembed(x_BTD, self.unembedding), self.model.logit_softcap)

    def decode(self, tokens_BT: jax.Array, start_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Append tokens to every row of the cache and return their features.

        Causality alone keeps rows apart from padding: a slot beyond a row's tokens holds rubbish
        until that row's own token overwrites it, and no query looks past its own slot.

        Args:
          tokens_BT: new tokens of each row.
          start_B: how many tokens each row holds already, the slot of its first new token.
          cache: from `init_cache`.

        Returns:
          Final features [B, T, D] and the new cache.
        """
        slots = cache[0].k_BSGK.shape[1]
        index_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        ones_BT, slot_BS = jnp.ones_like(index_BT), jnp.arange(slots)[None]
        mask = Mask(index_BT, slot_BS, ones_BT, jnp.ones_like(slot_BS))
        x_BTD = self._embed(tokens_BT, index_BT)
        full_BTS = mask.dense()
        layers: list[LayerCache] = []
        for i, block in enumerate(cast("Iterable[Block]", self.blocks)):
            window = self.model.window(i)
            seen_BTS = full_BTS if window >= slots else mask.dense(window)
            x_BTD, layer = block(x_BTD, index_BT, seen_BTS, cache=cache[i], start_B=start_B)
            assert layer is not None
            layers.append(layer)
        return self.norm(x_BTD).astype(self.compute.dtype), tuple(layers)
