"""Adaptive embedding and softmax: ids in order of frequency, in clusters of ever less effort.

Grave et al. 2017 ("Efficient softmax approximation for GPUs"), Baevski & Auli 2019 and
Transformer-XL's released code. The head holds the first cluster's ids and one entry for each later
cluster; an id of a later cluster has the probability of its cluster times its own within it.

Shapes: V ids, D width, C later clusters, E width of one cluster.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Compute, TransformerXL
from jaxgpt.layers.linear import Embedding, Linear, unembed
from jaxgpt.target import Target


def clusters(model: TransformerXL) -> list[tuple[int, int, int]]:
    """First id, end and width of each cluster."""
    edges = (0, *model.cutoffs, model.vocab_size)
    return [(start, end, model.width // model.div**i) for i, (start, end) in enumerate(pairwise(edges))]


def projection(key: jax.Array, width: int, model: TransformerXL, compute: Compute, target: Target) -> Linear:
    """From a cluster's width to the model's [E, D]."""
    axes, dtype = ("vector", "embed"), jnp.dtype(compute.dtype)
    return Linear(key, (width,), (model.width,), axes, bias=False, std=0.02, dtype=dtype, target=target)


class Tables(nnx.Module):
    """A vector of every id: one table [V, D], or where `div` > 1 a narrower one for each later cluster.

    The narrower ones have projections to the width, the first cluster a square one. Only the first
    table is split over devices: clusters need not divide, and the others are small.
    """

    def __init__(self, key: jax.Array, model: TransformerXL, compute: Compute, target: Target) -> None:
        self.clusters = tuple(clusters(model))
        keys = jax.random.split(key, 2 * len(self.clusters))
        self.tables, self.projections = nnx.List([]), nnx.List([])
        if model.div == 1:
            self.tables.append(Embedding(keys[0], model.vocab_size, model.width, std=0.02))
            return
        for i, (start, end, width) in enumerate(self.clusters):
            axes = ("position", "vector" if i else "embed")
            self.tables.append(Embedding(keys[2 * i], end - start, width, std=0.02, axes=axes))
            self.projections.append(projection(keys[2 * i + 1], width, model, compute, target))

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Vectors [..., D] of ids."""
        if not self.projections:
            return self.tables[0](ids, dtype)
        y = jnp.zeros((), dtype)
        for (start, end, _), table, project in zip(self.clusters, self.tables, self.projections, strict=True):
            inside = (ids >= start) & (ids < end)
            y = jnp.where(inside[..., None], project(table(jnp.where(inside, ids - start, 0), dtype)), y)
        return y

    def rows(self, cluster: int) -> jax.Array:
        """The vectors of a cluster's ids [end - start, E]."""
        if self.projections:
            return self.tables[cluster].weight[...]
        start, end, _ = self.clusters[cluster]
        return self.tables[0].weight[start:end]


class AdaptiveSoftmax(nnx.Module):
    """Log-probabilities of all ids, normalised exactly.

    With `tied` the tables are the embedding's, and so are the later clusters' projections; the first
    cluster keeps one of its own, as in the released code.
    """

    def __init__(self, key: jax.Array, model: TransformerXL, compute: Compute, target: Target) -> None:
        keys = jax.random.split(key, 3)
        self.clusters = tuple(clusters(model))
        later = len(self.clusters) - 1
        self.gates = Embedding(keys[0], later, model.width, std=0.02, axes=("position", "embed"))
        self.gates_bias = nnx.Param(jnp.zeros(later), axes=("vector",), role="bias")
        self.bias = nnx.Param(jnp.zeros(model.vocab_size), axes=("vocab",), role="bias")
        self.tables = None if model.tied else Tables(keys[1], model, compute, target)
        own = model.tied and model.div > 1
        self.first = projection(keys[2], model.width, model, compute, target) if own else None

    def head(self, x: jax.Array, embed: Tables) -> jax.Array:
        """Log-probabilities of the first cluster's ids and of the later clusters, float32."""
        end = self.clusters[0][1]
        x = self._narrow(0, x, embed)
        ids = unembed(x, (self.tables or embed).rows(0)) + self.bias[:end]
        gates = unembed(x, self.gates.weight[...]) + self.gates_bias[...]
        return jax.nn.log_softmax(jnp.concatenate([ids, gates], axis=-1))

    def tail(self, cluster: int, x: jax.Array, embed: Tables) -> jax.Array:
        """Log-probabilities of a later cluster's ids within it, float32."""
        start, end, _ = self.clusters[cluster]
        x = self._narrow(cluster, x, embed)
        return jax.nn.log_softmax(unembed(x, (self.tables or embed).rows(cluster)) + self.bias[start:end])

    def _narrow(self, cluster: int, x: jax.Array, embed: Tables) -> jax.Array:
        """Features in a cluster's width."""
        tables = self.tables or embed
        if not tables.projections:
            return x
        own = self.first if cluster == 0 and self.first is not None else tables.projections[cluster]
        return unembed(x, own.weight[...]).astype(x.dtype)

    def __call__(self, x: jax.Array, embed: Tables) -> jax.Array:
        """Log-probabilities [..., V], float32, of features [..., D].

        Args:
          x: the features.
          embed: the embedding, read where the two are tied.
        """
        head, end = self.head(x, embed), self.clusters[0][1]
        tails = [head[..., end + i - 1, None] + self.tail(i, x, embed) for i in range(1, len(self.clusters))]
        return jnp.concatenate([head[..., :end], *tails], axis=-1)

    def of(self, targets: jax.Array, x: jax.Array, embed: Tables) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the targets [...], and of each place's likeliest id.

        Never holds those of all ids at once: one cluster after the other.
        """
        head, end = self.head(x, embed), self.clusters[0][1]
        hit, top = _pick(head, targets, 0, end), head[..., :end].max(-1)
        for i, (start, end_i, _) in enumerate(self.clusters[1:], 1):
            tail = head[..., end + i - 1, None] + self.tail(i, x, embed)
            hit = jnp.where((targets >= start) & (targets < end_i), _pick(tail, targets, start, end_i), hit)
            top = jnp.maximum(top, tail.max(-1))
        return hit, top


def _pick(logprobs: jax.Array, targets: jax.Array, start: int, end: int) -> jax.Array:
    """Each target's entry; rubbish where it lies in another cluster."""
    index = jnp.clip(targets - start, 0, end - start - 1)[..., None]
    return jnp.take_along_axis(logprobs, index, axis=-1)[..., 0]
