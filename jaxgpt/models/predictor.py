"""The base class of all models: from features to logits, losses and log-probabilities.

Shapes: B rows, T tokens per row, S slots per row, D hidden size, V vocabulary (or labels).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import Compute
from jaxgpt.layers.cache import TokenCache, append_tokens
from jaxgpt.layers.unembedding import Drawn, Head, Losses, drawn_logprobs


class Predictor(nnx.Module):
    """A model that predicts an id at each token; subclasses provide the head, this class applies it."""

    compute: Compute

    @property
    def unembedding(self) -> Head:
        """The output projection."""
        raise NotImplementedError

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Final features of packed rows; a key turns dropout on."""
        raise NotImplementedError

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array | None, cache: Any, prefix_B: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Append tokens to every row of the cache and return their features; see `Decoder.decode`.

        This one keeps the tokens alone and computes a row's features anew from all of them. Any causal module
        can be sampled from this way, in quadratic instead of linear time per row.
        """
        B, T = tokens_BT.shape
        first_B = jnp.zeros(B, jnp.int32) if start_B is None else start_B
        cache = TokenCache(append_tokens(cache.tokens_BS, tokens_BT, first_B))
        row_BS = tokens_BT if start_B is None else cache.tokens_BS
        index_BS = jnp.broadcast_to(jnp.arange(row_BS.shape[1]), row_BS.shape)
        segments_BS = (index_BS < (first_B + T)[:, None]).astype(jnp.int32)  # what follows is not there yet
        zeros_BS = jnp.zeros(row_BS.shape, jnp.float32)
        x_BSD = self.hidden(Batch(row_BS, row_BS, zeros_BS, segments_BS, index_BS)).x_BTD
        at_BT = first_B[:, None] + jnp.arange(T)
        return jnp.take_along_axis(x_BSD, at_BT[..., None], axis=1), cache

    def last(self, x_BTD: jax.Array) -> jax.Array:
        """Final features of the stream behind the last layer; of an earlier one, its logit lens.

        A model that does something between its layers and its head, as a norm, says so here.
        """
        return x_BTD

    def transform(self, x: jax.Array) -> jax.Array:
        """The input of the output projection; by default the features themselves."""
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of features [..., D]; log-probabilities if the softmax is adaptive."""
        return self.unembedding(self.transform(x))

    @jax.named_scope("loss")
    def losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0
    ) -> Losses:
        """Weighted sums of the targets' losses; see `layers.unembedding.cross_entropy`."""
        chunk = self.compute.loss_chunk
        return self.unembedding.losses(self.transform(x_BTD), targets_BT, weights_BT, z_loss, chunk)

    @jax.named_scope("loss")
    def target_logprobs(self, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Log-probability of each target [B, T]; any function of them can be differentiated."""
        return self.unembedding.logprobs(self.transform(x_BTD), targets_BT, self.compute.loss_chunk)

    @jax.named_scope("loss")
    def drawn_logprobs(
        self, x_BTD: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array | None, drawn: Drawn
    ) -> tuple[jax.Array, jax.Array]:
        """Like `target_logprobs`, of the distribution that the sampler draws from, and that one's entropy;
        see `layers.unembedding.drawn_logprobs`.
        """
        x_BTD = self.transform(x_BTD)
        return drawn_logprobs(self.unembedding, x_BTD, targets_BT, kept_BT, drawn, self.compute.loss_chunk)
