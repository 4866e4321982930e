"""Heads on any backbone: over labels, for tagging of tokens and classification of texts; for rewards.

Shapes: B batch, T length, D hidden size, C labels or other outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import Classifier, Compute, Headed, RewardModel
from jaxgpt.layers.linear import Embedding
from jaxgpt.layers.residual import dropout
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.target import Target


class HeadedModule(Predictor):
    """A backbone and a linear head [C, D].

    Args:
      model: the backbone's config and what the head is for.
      compute: types, remat and kernels.
      target: what the program is built for.
      key: for the initial parameters.
      outputs: C.
      backbone: the module of the backbone's config.
      scanned: whether layers are stacked.
    """

    model: Any

    def __init__(
        self,
        model: Headed,
        compute: Compute,
        target: Target,
        key: jax.Array,
        outputs: int,
        *,
        backbone: Any,
        scanned: bool = True,
    ) -> None:
        self.model, self.compute = model, compute
        keys = jax.random.split(key)
        self.backbone = backbone(model.backbone, compute, target, keys[0], scanned=scanned)
        # There are few outputs: their axis is never sharded.
        self.head = Embedding(keys[1], outputs, model.width, std=0.02, axes=("position", "embed"))

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Input features of the head; a key turns dropout on, even in a frozen backbone."""
        keys: Any = (None, None) if key is None else jax.random.split(key)
        features = self.backbone.hidden(batch, keys[0])
        x_BTD = self.pooled(features.x_BTD, batch)
        return features._replace(x_BTD=dropout(x_BTD, self.model.head_dropout, keys[1]))

    def pooled(self, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        """What the head reads at each token; by default the token's own features."""
        return x_BTD


class ClassifierModule(HeadedModule):
    """A head over C labels, with a bias.

    A text's label is predicted at one token of its document, the one with a nonzero weight in the batch. So
    texts can be packed like any other document.
    """

    def __init__(
        self, model: Classifier, compute: Compute, target: Target, key: jax.Array, **backbone: Any
    ) -> None:
        super().__init__(model, compute, target, key, len(model.labels), **backbone)
        self.bias = nnx.Param(jnp.zeros(len(model.labels)), axes=("vector",), role="bias")

    @property
    def unembedding(self) -> Unembedding:
        """The head over the labels."""
        return Unembedding(self.head.weight[...], self.bias[...])

    def pooled(self, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        """The mean of the document at each token, where the label is of that."""
        return document_means(x_BTD, batch.segments_BT) if self.model.pool == "mean" else x_BTD


class RewardModule(HeadedModule):
    """A head of one output without a bias, which no difference of rewards would show."""

    def __init__(
        self, model: RewardModel, compute: Compute, target: Target, key: jax.Array, **backbone: Any
    ) -> None:
        super().__init__(model, compute, target, key, 1, **backbone)

    @property
    def unembedding(self) -> Unembedding:
        """The head, over one output."""
        return Unembedding(self.head.weight[...])

    def rewards(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """The reward of each document at its last token, 0 at all others [B, T], float32."""
        after_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
        last_BT = (segments_BT > 0) & (segments_BT != after_BT)
        return jnp.where(last_BT, self.logits(x_BTD)[..., 0], 0)


def document_means(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The mean over each token's document, at every token [B, T, D]."""
    same_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]).astype(jnp.float32)
    mean_BTT = same_BTT / same_BTT.sum(-1, keepdims=True)
    return jnp.einsum("bts,bsd->btd", mean_BTT, x_BTD.astype(jnp.float32)).astype(x_BTD.dtype)
