"""The decoder: from GPT-2 to current architectures with one config (`jaxgpt.config.GPT`).

Shapes: B batch, T length, S cache slots, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import GPT, Compute
from jaxgpt.layers.added import NOTHING, Added, Bottleneck, Bottlenecks, Pair, around
from jaxgpt.layers.attention import Attention
from jaxgpt.layers.cache import Cache, HeldLayer, LayerCache, cached_layers, slots_of
from jaxgpt.layers.linear import Embedding
from jaxgpt.layers.mask import LayerFacts, Mask, RowFacts, document_starts
from jaxgpt.layers.mlp import MLP
from jaxgpt.layers.moe import Experts, Routing
from jaxgpt.layers.norm import Norm, model_norm
from jaxgpt.layers.position import frequencies
from jaxgpt.layers.residual import dropout, residual
from jaxgpt.layers.stack import run_layers, stacked
from jaxgpt.layers.tape import recording
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.sharding import constrain, row_shards
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
        self.dtype = jnp.dtype(compute.dtype)

    def __call__(
        self, x_BTD: jax.Array, rows: RowFacts, layer: LayerFacts, cache: HeldLayer | None = None
    ) -> tuple[jax.Array, Routing | None, HeldLayer | None]:
        """The layer's output, statistics of its routing (None if dense), and its cache."""
        keys = (None, None) if layer.key is None else jax.random.split(layer.key)

        def attend(x_BTD: jax.Array) -> tuple[jax.Array, HeldLayer | None]:
            return self.attention(x_BTD, rows, layer, cache)

        def mix(x_BTD: jax.Array) -> tuple[jax.Array, Routing | None]:
            if isinstance(self.mlp, Experts):
                return self.mlp(x_BTD, rows.real_BT)
            return self.mlp(x_BTD, rows.adapters_B), None

        own = layer.adapter or Bottlenecks()
        norms = (self.attention_norm, self.attention_out_norm)
        x_BTD, new = self._branch(x_BTD, attend, *norms, keys[0], own.attention)
        norms = (self.mlp_norm, self.mlp_out_norm)
        x_BTD, routing = self._branch(x_BTD, mix, *norms, keys[1], own.mlp, own.beside)
        return constrain(x_BTD, "batch", "length", "features"), routing, new

    def _branch(
        self,
        x_BTD: jax.Array,
        function: Callable[[jax.Array], tuple[jax.Array, Any]],
        norm: Norm,
        out_norm: Norm | None,
        key: jax.Array | None,
        adapter: Bottleneck | None = None,
        beside: Bottleneck | None = None,
    ) -> tuple[jax.Array, Any]:
        """`x + function(norm(x))`, or `norm(x + function(x))` with norms after the sum.

        An adapter works on the branch's output, one `beside` it on its input.
        """
        inner_BTD = x_BTD if self.post else norm(x_BTD)
        y_BTD, extra = function(inner_BTD)
        y_BTD = dropout(y_BTD if out_norm is None else out_norm(y_BTD), self.rate, key)
        if beside is not None:
            y_BTD = y_BTD + beside(inner_BTD, self.dtype, self.target)
        x_BTD = residual(x_BTD, y_BTD, self.target, around(adapter, self.dtype, self.target))
        return norm(x_BTD) if self.post else x_BTD, extra


def norm_readers(model: GPT) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block that read each norm's output, where nothing else reads it."""
    if model.norm_at == "post":  # the stream reads it too
        return {}
    found: dict[str, tuple[str, ...]] = {"attention_norm": ("attention.q", "attention.k", "attention.v")}
    return found if model.moe else found | {"mlp_norm": ("mlp.up", "mlp.gate")}


def make_blocks(model: GPT, compute: Compute, target: Target, key: jax.Array, *, scanned: bool) -> Any:
    """The layers, stacked or as a list."""

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
    added: Added = NOTHING,
) -> tuple[jax.Array, Routing | None]:
    """Run packed rows through the layers; a key turns dropout on. Of what is added, a prompt is ignored.

    Returns:
      Features before the final norm, and the mean of the layers' routing statistics.
    """
    segments_BT, key_L = batch.segments_BT, None
    mask = Mask.of_rows(segments_BT, prompts(batch) if model.prefix else None, causal=model.causal)
    rows = RowFacts(batch.positions_BT, mask, segments_BT > 0)
    if key is not None and model.dropout:
        key_L = jax.random.split(key, model.layers)
    windows = model.windows or (0,)

    def call(
        block: Block, x_BTD: jax.Array, rows: RowFacts, own: LayerFacts, place: int
    ) -> tuple[jax.Array, Routing | None]:
        return block(x_BTD, rows, replace(own, window=windows[place]))[:2]

    frequency_LK = jax.tree.map(jnp.asarray, layer_frequencies(model))
    per_layer = LayerFacts(frequency_LK, key_L, added.prefix, added.adapters)
    how = {"period": len(windows)}
    x_BTD, routing = run_layers(blocks, x_BTD, rows, per_layer, call, compute, target, **how)
    return x_BTD, jax.tree.map(jnp.mean, routing)


def layer_frequencies(model: GPT) -> np.ndarray | None:
    """Frequencies of the rotary embedding of all layers [L, K/2]; None without one."""
    if model.position != "rope":
        return None
    return np.stack([frequencies(model, i) for i in range(model.layers)])


def virtual_tokens(x_PD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embeddings of virtual tokens and their positions, as a batch: a row for each device that has rows."""
    copies = row_shards(jax.sharding.get_abstract_mesh())
    x_BPD = jnp.broadcast_to(x_PD, (copies, *x_PD.shape))
    return x_BPD, jnp.broadcast_to(jnp.arange(len(x_PD)), x_BPD.shape[:2])


def keys_and_values(blocks: Any, model: GPT, compute: Compute, target: Target, x_BPD: jax.Array) -> Pair:
    """Keys and values of all layers [L, P, G, K], of rows that are alike, with nothing before them."""
    (B, P), windows = x_BPD.shape[:2], model.windows or (0,)
    index_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
    rows = RowFacts(index_BP, Mask.of_rows(jnp.ones_like(index_BP), causal=model.causal, one=True))
    empty = jnp.zeros((B, P, model.groups, model.head), compute.dtype)

    def call(
        block: Block, x_BPD: jax.Array, rows: RowFacts, own: LayerFacts, place: int
    ) -> tuple[jax.Array, Pair]:
        x_BPD, _, held = block(x_BPD, rows, replace(own, window=windows[place]), LayerCache(empty, empty))
        assert held is not None
        return x_BPD, (held.k_BSGK[0], held.v_BSGK[0])

    facts = LayerFacts(jax.tree.map(jnp.asarray, layer_frequencies(model)))
    with recording(None):
        return run_layers(blocks, x_BPD, rows, facts, call, compute, target, period=len(windows))[1]


def routed(x_BTD: jax.Array, routing: Routing | None) -> Features:
    """Final features with the routing statistics from `run_blocks`."""
    if routing is None:
        return Features(x_BTD)
    stats = {"expert_rounds": routing.rounds, "expert_fill": routing.fill}
    return Features(x_BTD, routing.balance, stats=stats)


def prompts(batch: Batch) -> jax.Array:
    """Which tokens belong to a prompt [B, T]: those up to the input of a document's first target."""
    trained_BT = batch.weights_BT > 0
    before_BT = jnp.cumsum(trained_BT, axis=1) - trained_BT  # trained targets before this one
    base_BT = jax.lax.cummax(jnp.where(document_starts(batch.segments_BT), before_BT, 0), axis=1)
    return (before_BT == base_BT) & (batch.segments_BT > 0)


class Decoder(Predictor):
    """A causal language model (bidirectional if `GPT.causal` is False).

    Attributes:
      added: what a tuning method has added to it.

    Args:
      model: the architecture.
      compute: types, remat and kernels.
      target: what the program is built for.
      key: for the initial parameters.
      scanned: whether layers are stacked. Decoding on a CPU uses unstacked layers (False), whose parameters
        come from `decoding_params`.
    """

    added: Added = NOTHING

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
        """A separate projection, or the embedding."""
        return Unembedding((self.head or self.embed).weight.get_value(), cap=self.model.logit_softcap)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return self._begin(self.embed(tokens_BT, self.target.stream_dtype(self.compute)), positions_BT)

    def _begin(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The stream that enters the layers, of embeddings."""
        dtype = x_BTD.dtype
        if self.model.embed_scale:
            x_BTD = x_BTD * jnp.asarray(self.model.width**0.5, dtype)  # rounded, as in Gemma
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT, dtype)
        return constrain(x_BTD, "batch", "length", "features")

    def last(self, x_BTD: jax.Array) -> jax.Array:
        """Final features of the stream behind the last layer."""
        return (x_BTD if self.norm is None else self.norm(x_BTD)).astype(self.compute.dtype)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Final normalised features of packed rows; a key turns dropout on."""
        model = self.model
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        added = self.settled()
        batch = replace(batch, positions_BT=batch.positions_BT + added.tokens)
        x_BTD = dropout(self._embed(batch.tokens_BT, batch.positions_BT), model.dropout, embed_key)
        how = (self.blocks, model, self.compute, self.target)
        x_BTD, routing = run_blocks(*how, x_BTD, batch, layers_key, added)
        return routed(self.last(x_BTD), routing)

    def settled(self) -> Added:
        """What is added, with the keys and values of a prompt in place of the prompt.

        Virtual tokens see no other ones, so that their keys and values are the same for all documents, and
        are computed once.
        """
        if self.added.prompt_PD is None:
            return self.added
        return replace(self.added, prompt_PD=None, prefix=self.keys_and_values(self.added.prompt_PD))

    def keys_and_values(self, x_PD: jax.Array) -> Pair:
        """Those of tokens with these embeddings, of all layers [L, P, G, K]."""
        x_BPD, index_BP = virtual_tokens(x_PD.astype(self.target.stream_dtype(self.compute)))
        parts = (self.blocks, self.model, self.compute, self.target)
        return keys_and_values(*parts, self._begin(x_BPD, index_BP))

    def decode(
        self,
        tokens_BT: jax.Array,
        start_B: jax.Array | None,
        cache: Cache,
        prefix_B: jax.Array | None = None,
        adapters_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Append tokens to every row of the cache and return their features.

        Causality alone keeps padding hidden: a slot beyond a row's tokens holds garbage until the row's own
        token overwrites it, and no query looks past its own slot.

        Args:
          tokens_BT: new tokens of each row.
          start_B: number of tokens that each row already holds, which is the slot of its first new token.
            None means an empty cache; attention then works as in training, with the same kernel.
          cache: from `init_cache`.
          prefix_B: number of first tokens of each row that see each other under `GPT.prefix`; None for later
            calls.
          adapters_B: number of each row's adapter, where the weights hold several.

        Returns:
          Final features [B, T, D] and the new cache.
        """
        model, T, slots, prefix_BS = self.model, tokens_BT.shape[1], slots_of(cache), None
        added = self.settled()
        index_BT = jnp.arange(T) + (
            jnp.zeros((len(tokens_BT), 1), jnp.int32) if start_B is None else start_B[:, None]
        )
        index_1S = jnp.arange(T if start_B is None else slots)[None]
        if model.prefix and prefix_B is not None:
            prefix_BS = index_1S < prefix_B[:, None]
        ones_BT = jnp.ones_like(index_BT)
        if start_B is None:
            mask = Mask.of_rows(ones_BT, prefix_BS, one=True)
        else:
            mask = Mask(index_BT, index_1S, ones_BT, jnp.ones_like(index_1S), prefix_BS)
        places_BT, windows = index_BT + added.tokens, model.windows or (0,)
        rows = RowFacts(places_BT, mask, start_B=start_B, adapters_B=adapters_B)
        facts = LayerFacts(layer_frequencies(model), prefix=added.prefix, adapter=added.adapters)

        def call(
            block: Block, x_BTD: jax.Array, rows: RowFacts, own: LayerFacts, held: HeldLayer, place: int
        ) -> tuple[jax.Array, HeldLayer | None]:
            x_BTD, _, new = block(x_BTD, rows, replace(own, window=windows[place]), held)
            return x_BTD, new

        x_BTD, how = self._embed(tokens_BT, places_BT), {"period": len(windows)}
        x_BTD, cache = cached_layers(self.blocks, x_BTD, rows, facts, cache, call, **how)
        return self.last(x_BTD), cache
