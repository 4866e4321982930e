"""A head over labels on any backbone: tagging of tokens, classification of texts.

Shapes: B batch, T length, D hidden size, C labels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import Classifier, Compute
from jaxgpt.layers.linear import Embedding
from jaxgpt.layers.residual import dropout
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.target import Target


class ClassifierModule(Predictor):
    """A backbone and a linear head [C, D] with a bias.

    A text's label is predicted at one token of its document, the one with a nonzero weight in the batch. So
    texts can be packed like any other document.

    Args:
      model: the backbone's config, the labels and how they are pooled.
      compute: types, remat and kernels.
      target: what the program is built for.
      key: for the initial parameters.
      backbone: the module of the backbone's config.
      scanned: whether layers are stacked.
    """

    def __init__(
        self,
        model: Classifier,
        compute: Compute,
        target: Target,
        key: jax.Array,
        *,
        backbone: type,
        scanned: bool = True,
    ) -> None:
        self.model, self.compute = model, compute
        keys = jax.random.split(key)
        self.backbone = backbone(model.backbone, compute, target, keys[0], scanned=scanned)
        # There are few labels: their axis is never sharded.
        self.head = Embedding(keys[1], len(model.labels), model.width, std=0.02, axes=("position", "embed"))
        self.bias = nnx.Param(jnp.zeros(len(model.labels)), axes=("vector",), role="bias")

    @property
    def unembedding(self) -> Unembedding:
        """The head over the labels."""
        return Unembedding(self.head.weight[...], self.bias[...])

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Input features of the head; a key turns dropout on, even in a frozen backbone."""
        keys: Any = (None, None) if key is None else jax.random.split(key)
        features = self.backbone.hidden(batch, keys[0])
        x_BTD = features.x_BTD
        if self.model.pool == "mean":
            x_BTD = document_means(x_BTD, batch.segments_BT)
        return features._replace(x_BTD=dropout(x_BTD, self.model.head_dropout, keys[1]))


def document_means(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The mean over each token's document, at every token [B, T, D]."""
    same_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]).astype(jnp.float32)
    mean_BTT = same_BTT / same_BTT.sum(-1, keepdims=True)
    return jnp.einsum("bts,bsd->btd", mean_BTT, x_BTD.astype(jnp.float32)).astype(x_BTD.dtype)
