"""The bidirectional encoder (BERT; Devlin et al. 2019), with its masked-LM head.

Shapes: B batch, T length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import Bert, Compute
from jaxgpt.layers.added import NOTHING, Added, Pair
from jaxgpt.layers.linear import Embedding, Linear
from jaxgpt.layers.mlp import ACTIVATIONS
from jaxgpt.layers.norm import model_norm
from jaxgpt.layers.residual import dropout
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.gpt import keys_and_values, make_blocks, routed, run_blocks, virtual_tokens
from jaxgpt.models.predictor import Predictor
from jaxgpt.sharding import constrain
from jaxgpt.target import Target


class Encoder(Predictor):
    """Normalised embeddings of token, position and token type; post-norm layers; the head.

    Args:
      model: the architecture.
      compute: types, remat and kernels.
      target: what the program is built for.
      key: for the initial parameters.
      scanned: whether layers are stacked.
    """

    added: Added = NOTHING

    def __init__(
        self, model: Bert, compute: Compute, target: Target, key: jax.Array, *, scanned: bool = True
    ) -> None:
        self.model, self.compute, self.target = model, compute, target
        keys, blocks = jax.random.split(key, 5), model.blocks
        self.embed = Embedding(keys[0], model.vocab_size, model.width, std=0.02)
        table = {"std": 0.02, "axes": ("position", "embed"), "role": "position"}
        self.position = Embedding(keys[1], model.context, model.width, **table)
        self.types = Embedding(keys[2], model.types, model.width, **table)
        self.embed_norm = model_norm(blocks, target)
        self.blocks = make_blocks(blocks, compute, target, keys[3], scanned=scanned)
        D, dtype = model.width, jnp.dtype(compute.dtype)
        axes = ("embed", "vector")
        self.dense = Linear(keys[4], (D,), (D,), axes, bias=True, std=0.02, dtype=dtype, target=target)
        self.dense_norm = model_norm(blocks, target)
        self.bias = nnx.Param(jnp.zeros(model.vocab_size), axes=("vocab",), role="bias")

    @property
    def unembedding(self) -> Unembedding:
        """The embedding, with a bias."""
        return Unembedding(self.embed.weight[...], self.bias[...])

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Final features of packed rows; a key turns dropout on."""
        model, dtype = self.model, self.target.stream_dtype(self.compute)
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        types_BT = jnp.zeros_like(batch.tokens_BT) if batch.types_BT is None else batch.types_BT
        batch = replace(batch, positions_BT=batch.positions_BT + self.added.tokens)
        x_BTD = self._begin(self.embed(batch.tokens_BT, dtype), batch.positions_BT, types_BT)
        x_BTD = constrain(dropout(x_BTD, model.dropout, embed_key), "batch", "length", "features")
        x_BTD, routing = run_blocks(
            self.blocks, model.blocks, self.compute, self.target, x_BTD, batch, layers_key, self.added
        )
        return routed(self.last(x_BTD), routing)

    def last(self, x_BTD: jax.Array) -> jax.Array:
        """Final features of the stream behind the last layer."""
        return x_BTD.astype(self.compute.dtype)

    def _begin(self, x_BTD: jax.Array, positions_BT: jax.Array, types_BT: jax.Array) -> jax.Array:
        """The stream that enters the layers, of embeddings."""
        x_BTD = x_BTD + self.position(positions_BT, x_BTD.dtype)
        return self.embed_norm(x_BTD + self.types(types_BT, x_BTD.dtype))

    def keys_and_values(self, x_PD: jax.Array) -> Pair:
        """Those of tokens with these embeddings, of all layers [L, P, G, K]."""
        x_BPD, index_BP = virtual_tokens(x_PD.astype(self.target.stream_dtype(self.compute)))
        x_BPD = self._begin(x_BPD, index_BP, jnp.zeros_like(index_BP))
        return keys_and_values(self.blocks, self.model.blocks, self.compute, self.target, x_BPD)

    def transform(self, x: jax.Array) -> jax.Array:
        """The input of the output projection: an extra layer of the head, applied to the features."""
        return self.dense_norm(ACTIVATIONS[self.model.mlp][0](self.dense(x)))
