"""Adaptive embedding and softmax: ids sorted by frequency, in clusters that are ever cheaper to compute.

Grave et al. 2017 ("Efficient softmax approximation for GPUs"), Baevski & Auli 2019 and
Transformer-XL's released code. The head covers the ids of the first cluster and has one entry for each later
cluster. The probability of an id in a later cluster is that of its cluster times its own within the cluster.

Shapes: V ids, D hidden size, C later clusters, E embedding size of one cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Compute, TransformerXL
from jaxgpt.errors import require
from jaxgpt.layers.linear import Embedding, Linear
from jaxgpt.layers.perturb import perturbed
from jaxgpt.layers.unembedding import Drawn, Head, Losses, Pull, Scores, Unembedding
from jaxgpt.target import Target


def clusters(model: TransformerXL) -> list[tuple[int, int, int]]:
    """First id, end and embedding size of each cluster."""
    edges = (0, *model.cutoffs, model.vocab_size)
    return [(start, end, model.width // model.div**i) for i, (start, end) in enumerate(pairwise(edges))]


def projection(key: jax.Array, width: int, model: TransformerXL, compute: Compute, target: Target) -> Linear:
    """Projection from a cluster's embedding size to the hidden size [E, D]."""
    axes, dtype = ("vector", "embed"), jnp.dtype(compute.dtype)
    return Linear(key, (width,), (model.width,), axes, bias=False, std=0.02, dtype=dtype, target=target)


class Tables(nnx.Module):
    """Embeddings of all ids: one table [V, D], or if `div` > 1 a narrower one for each later cluster.

    Every cluster's table then has a projection to the hidden size; that of the first is square. Only the
    first table is sharded: cluster sizes need not divide by the devices, and the other tables are small.
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
        """Embeddings [..., D] of ids."""
        if not self.projections:
            return self.tables[0](ids, dtype)
        y = jnp.zeros((), dtype)
        for (start, end, _), table, project in zip(self.clusters, self.tables, self.projections, strict=True):
            inside = (ids >= start) & (ids < end)
            y = jnp.where(inside[..., None], project(table(jnp.where(inside, ids - start, 0), dtype)), y)
        return perturbed(y)

    def rows(self, cluster: int) -> jax.Array:
        """The embeddings of a cluster's ids [end - start, E]."""
        if self.projections:
            return self.tables[cluster].weight[...]
        start, end, _ = self.clusters[cluster]
        return self.tables[0].weight[start:end]


class AdaptiveSoftmax(nnx.Module):
    """The parameters of an `AdaptiveUnembedding`.

    With `tied`, the tables and the later clusters' projections are those of the embedding. The first cluster
    has its own projection, as in the released code.
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

    def over(self, embed: Tables) -> AdaptiveUnembedding:
        """The head, with the embedding's tables if they are tied."""
        tables, narrow = self.tables or embed, list[Unembedding]()
        for i, project in enumerate(tables.projections):
            own = self.first if i == 0 and self.first is not None else project
            narrow.append(Unembedding(own.weight[...]))
        ids = [
            Unembedding(tables.rows(i), self.bias[start:end])
            for i, (start, end, _) in enumerate(self.clusters)
        ]
        gates = Unembedding(self.gates.weight[...], self.gates_bias[...])
        return AdaptiveUnembedding(tuple(narrow), tuple(ids), gates)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptiveUnembedding(Head):
    """Log-probabilities of all ids, normalised exactly.

    Attributes:
      narrow: projections from the hidden size to each cluster's size; empty if all clusters have the hidden
        size.
      ids: output projection of each cluster.
      gates: output projection of the later clusters' entries, applied to the first cluster's features.
    """

    narrow: tuple[Unembedding, ...]
    ids: tuple[Unembedding, ...]
    gates: Unembedding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Log-probabilities [..., V], float32, of features [..., D]."""
        first, gates = self._first(x)
        later = [gates[..., i - 1, None] + self._later(i, x) for i in range(1, len(self.ids))]
        return jnp.concatenate([first, *later], axis=-1)

    def score(
        self,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        drawn: Drawn | None = None,
        kept_BT: jax.Array | None = None,
    ) -> tuple[Scores, Pull]:
        assert drawn is None, "`Run` pairs no objective with it that asks for this"
        # In float32, like the sum of its gradients over all chunks; products round to the features' type
        # again.
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), self)
        hit_BT, back, top_BT = jax.vjp(lambda head, x: head.of(targets_BT, x), wide, x_BTD, has_aux=True)

        def pull(dlogprob_BT: jax.Array, dlog_z_BT: jax.Array) -> tuple[AdaptiveUnembedding, jax.Array]:
            return back(dlogprob_BT)  # predictions are normalised: log_z is 0 whatever the parameters

        return Scores(hit_BT, jnp.zeros_like(hit_BT), hit_BT >= top_BT), pull

    def losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float, chunk: int
    ) -> Losses:
        require(
            z_loss == 0,
            f"objective.z_loss is {z_loss} but the adaptive softmax of model.cutoffs has no single "
            "log-partition; set it to 0.",
        )
        return super().losses(x_BTD, targets_BT, weights_BT, z_loss, chunk)

    def of(self, targets: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the targets [...], and of the most likely id at each position.

        Processes one cluster after the other, so it never stores the log-probabilities of all ids at once.
        """
        logprobs, gates = self._first(x)
        hit, top, end = _pick(logprobs, targets), logprobs.max(-1), logprobs.shape[-1]
        for i in range(1, len(self.ids)):
            logprobs = gates[..., i - 1, None] + self._later(i, x)
            start, end = end, end + logprobs.shape[-1]
            hit = jnp.where((targets >= start) & (targets < end), _pick(logprobs, targets - start), hit)
            top = jnp.maximum(top, logprobs.max(-1))
        return hit, top

    def _first(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the first cluster's ids and of the later clusters, float32."""
        x = self._narrow(0, x)
        ids, gates = self.ids[0](x), self.gates(x)
        both = jax.nn.log_softmax(jnp.concatenate([ids, gates], axis=-1))
        return both[..., : ids.shape[-1]], both[..., ids.shape[-1] :]

    def _later(self, cluster: int, x: jax.Array) -> jax.Array:
        """Log-probabilities of a later cluster's ids within it, float32."""
        return jax.nn.log_softmax(self.ids[cluster](self._narrow(cluster, x)))

    def _narrow(self, cluster: int, x: jax.Array) -> jax.Array:
        return self.narrow[cluster](x).astype(x.dtype) if self.narrow else x


def _pick(logprobs: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of each position at its index; garbage if the index is out of range."""
    index = jnp.clip(index, 0, logprobs.shape[-1] - 1)[..., None]
    return jnp.take_along_axis(logprobs, index, axis=-1)[..., 0]
