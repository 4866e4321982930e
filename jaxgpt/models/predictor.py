"""The base class of all models: from features to logits, losses and log-probabilities.

Shapes: B rows, T tokens per row, D hidden size, V vocabulary (or labels).
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxgpt.config import Compute
from jaxgpt.layers.unembedding import Head, Losses


class Predictor(nnx.Module):
    """A model that predicts an id at each token; subclasses provide the head, this class applies it."""

    compute: Compute

    @property
    def unembedding(self) -> Head:
        """The output projection."""
        raise NotImplementedError

    def transform(self, x: jax.Array) -> jax.Array:
        """The input of the output projection; by default the features themselves."""
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of features [..., D]; log-probabilities if the softmax is adaptive."""
        return self.unembedding(self.transform(x))

    def losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0
    ) -> Losses:
        """Weighted sums of the targets' losses; see `layers.unembedding.cross_entropy`."""
        chunk = self.compute.loss_chunk
        return self.unembedding.losses(self.transform(x_BTD), targets_BT, weights_BT, z_loss, chunk)

    def target_logprobs(self, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Log-probability of each target [B, T]; any function of them can be differentiated."""
        return self.unembedding.logprobs(self.transform(x_BTD), targets_BT, self.compute.loss_chunk)
