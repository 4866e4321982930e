"""Transformer-XL (Dai et al. 2019): relative positions, and a memory carried from segment to segment.

Every layer keeps its input features of the last M tokens. The next segment attends to them like to its
own tokens, but without a gradient. The score of a query i and a key j, before scaling, is
(q_i + u) . k_j + (q_i + v) . r_(i - j), where r is a projection of a sinusoid of the distance, and u and v
are learned (section 3.3).

Shapes: B batch, T length, M memory, S = M + T keys (or cache slots), N distances, D hidden size, H heads,
K head size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch, Features
from jaxgpt.config import Compute, TransformerXL
from jaxgpt.layers.adaptive import AdaptiveSoftmax, Tables
from jaxgpt.layers.added import NOTHING, Added, Bottleneck, Bottlenecks, around
from jaxgpt.layers.cache import Cache, HeldLayer, cached_layers, slots_of
from jaxgpt.layers.kernels import attend, pick_kernel
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.linear import Embedding, Linear, add_bias
from jaxgpt.layers.mask import Mask
from jaxgpt.layers.mlp import MLP
from jaxgpt.layers.norm import model_norm
from jaxgpt.layers.residual import dropout, residual
from jaxgpt.layers.stack import run_layers, stacked
from jaxgpt.layers.unembedding import Head, Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.sharding import constrain
from jaxgpt.target import Target


class Memory(NamedTuple):
    """What is kept of earlier tokens (a pytree).

    Attributes:
      x_BLMD: input features of each layer.
      segments_BM: their document numbers as in `Batch`; 0 in empty slots.
    """

    x_BLMD: jax.Array
    segments_BM: jax.Array


def init_memory(model: TransformerXL, compute: Compute, target: Target, rows: int, length: int) -> Memory:
    """An empty memory with `length` slots for each of `rows` rows."""
    shape = (rows, model.layers, length, model.width)
    return Memory(jnp.zeros(shape, target.stream_dtype(compute)), jnp.zeros((rows, length), jnp.int32))


def decoding_window(model: TransformerXL) -> int:
    """Number of tokens that a token sees in decoding, including itself; 0 means all (without a memory).

    It equals what a segment of this single token sees with the memory of evaluation.
    """
    memory = model.memory if model.eval_memory is None else model.eval_memory
    if model.same_length:
        return memory or model.memory
    return memory + 1 if memory else 0


def sinusoids(count: int, width: int, clamp: int) -> jax.Array:
    """Embeddings [N, D] of the distances 0, 1, ...: sines, then cosines (section 3.3's R).

    Args:
      count: N.
      width: D, even.
      clamp: larger distances are replaced by it; 0 means no clamping.
    """
    distance_N = jnp.arange(count, dtype=jnp.float32)
    distance_N = jnp.minimum(distance_N, clamp) if clamp else distance_N
    frequency_K = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle_NK = distance_N[:, None] * frequency_K
    return jnp.concatenate([jnp.sin(angle_NK), jnp.cos(angle_NK)], axis=-1)


def relative_shift(x_BHTS: jax.Array) -> jax.Array:
    """Convert scores by distance to scores by key in O(T S): pad by a column and reshape.

    Appendix B of the paper. Column c holds distance S - 1 - c. In the result, column j of row i holds
    distance S - T + i - j; keys after their query hold garbage.
    """
    B, H, T, S = x_BHTS.shape
    padded = jnp.pad(x_BHTS, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, H, S + 1, T)[:, :, 1:].reshape(B, H, T, S)


class Biases(nnx.Module):
    """The learned biases u (content) and v (position), [H, K] each."""

    def __init__(self, key: jax.Array, model: TransformerXL) -> None:
        u_key, v_key = jax.random.split(key)
        shape, axes = (model.heads, model.head), ("heads", "head")
        self.u = nnx.Param(0.02 * jax.random.normal(u_key, shape), axes=axes, role="bias")
        self.v = nnx.Param(0.02 * jax.random.normal(v_key, shape), axes=axes, role="bias")


class RelativeAttention(nnx.Module):
    """Attention with relative positions over a memory and the segment, or over a cache."""

    def __init__(self, key: jax.Array, model: TransformerXL, compute: Compute, target: Target) -> None:
        D, H, K = model.width, model.heads, model.head
        keys, self.target = jax.random.split(key, 6), target
        how = {"bias": False, "dtype": jnp.dtype(compute.dtype), "target": target}

        def into_heads(key: jax.Array, name: str) -> Linear:
            return Linear(key, (D,), (H, K), ("embed", name, "head"), std=0.02, **how)

        self.q, self.relative = into_heads(keys[0], "heads"), into_heads(keys[1], "heads")
        self.k, self.v = into_heads(keys[2], "kv_heads"), into_heads(keys[3], "kv_heads")
        std = 0.02 * (2 * model.layers) ** -0.5
        axes = ("heads", "head", "embed")
        self.out = Linear(keys[4], (H, K), (D,), axes, std=std, **how)
        self.biases = None if model.shared_biases else Biases(keys[5], model)
        self.scale = K**-0.5
        # Logs (under `strict` raises) that no other kernel supports scores by distance.
        pick_kernel(replace(model.blocks, position="relative"), compute, target)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: jax.Array,
        keys_BSD: jax.Array,
        mask: Mask,
        sinusoid_ND: jax.Array,
        shared: Biases | None,
        cache: HeldLayer | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, HeldLayer | None]:
        """Attend to `keys_BSD`, or to a cache after appending them to it at the slots `start_B`.

        Args:
          x_BTD: features of the queries: the last T of the keys.
          keys_BSD: features of the keys, in order.
          mask: which keys each query sees.
          sinusoid_ND: of the distances from 0 on; of all S distances without a cache.
          shared: biases shared by all layers, if a layer has no biases of its own.
          cache, start_B: see above.

        Returns:
          [B, T, D], and the cache with the new tokens (None without a cache).
        """
        biases = self.biases or shared
        assert biases is not None
        q_BTHK, k_BSHK, v_BSHK = self.q(x_BTD), self.k(keys_BSD), self.v(keys_BSD)
        qu_BTHK, qv_BTHK = (add_bias(q_BTHK, b[...], self.target) for b in (biases.u, biases.v))
        r_NHK = self.relative(sinusoid_ND.astype(x_BTD.dtype))

        def by_distance(r_NHK: jax.Array) -> jax.Array:
            q = qv_BTHK * self.scale
            return jnp.einsum("bthk,nhk->bhtn", q, r_NHK, preferred_element_type=jnp.float32)

        if cache is None:
            bias_BHTS = relative_shift(by_distance(r_NHK[::-1]))
        else:
            assert start_B is not None
            cache = cache.append(k_BSHK, v_BSHK, start_B)
            k_BSHK, v_BSHK = cache.k_BSGK, cache.v_BSGK
            back_B1TS = jnp.clip(mask.distance(), 0, len(r_NHK) - 1)[:, None]
            bias_BHTS = jnp.take_along_axis(by_distance(r_NHK), back_B1TS, axis=-1)
        scores = Scores(self.scale, self.target, bias=bias_BHTS)
        y_BTHK = attend(qu_BTHK, k_BSHK, v_BSHK, mask, scores)
        return self.out(y_BTHK), cache


class Layer(nnx.Module):
    """Attention, then the MLP, each on a residual branch with a norm after the sum or on its input."""

    def __init__(self, key: jax.Array, model: TransformerXL, compute: Compute, target: Target) -> None:
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm, self.mlp_norm = (model_norm(model.blocks, target) for _ in range(2))
        self.attention = RelativeAttention(attention_key, model, compute, target)
        self.mlp = MLP(mlp_key, model.blocks, compute, target)
        self.rate, self.post, self.target = model.dropout, model.norm_at == "post", target
        self.dtype = jnp.dtype(compute.dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        keys_BSD: jax.Array,
        *how: Any,
        key: jax.Array | None = None,
        adapters: Bottlenecks | None = None,
    ) -> tuple[jax.Array, HeldLayer | None]:
        """The layer's output and cache; `how` holds the other arguments of `RelativeAttention`."""
        keys, own = (None, None) if key is None else jax.random.split(key), adapters or Bottlenecks()
        if self.post:
            y_BTD, cache = self.attention(x_BTD, keys_BSD, *how)
            x_BTD = self.attention_norm(self._add(x_BTD, y_BTD, keys[0], own.attention))
            x_BTD = self.mlp_norm(self._mix(x_BTD, x_BTD, keys[1], own))
        else:
            keys_BSD = self.attention_norm(keys_BSD)
            y_BTD, cache = self.attention(keys_BSD[:, -x_BTD.shape[1] :], keys_BSD, *how)
            x_BTD = self._add(x_BTD, y_BTD, keys[0], own.attention)
            x_BTD = self._mix(x_BTD, self.mlp_norm(x_BTD), keys[1], own)
        return constrain(x_BTD, "batch", "length", "features"), cache

    def _mix(
        self, x_BTD: jax.Array, inner_BTD: jax.Array, key: jax.Array | None, own: Bottlenecks
    ) -> jax.Array:
        """The MLP's branch, on its input `inner_BTD`."""
        return self._add(x_BTD, self.mlp(inner_BTD), key, own.mlp, own.beside, inner_BTD)

    def _add(
        self,
        x_BTD: jax.Array,
        y_BTD: jax.Array,
        key: jax.Array | None,
        adapter: Bottleneck | None,
        beside: Bottleneck | None = None,
        inner_BTD: jax.Array | None = None,
    ) -> jax.Array:
        y_BTD = dropout(y_BTD, self.rate, key)
        if beside is not None and inner_BTD is not None:
            y_BTD = y_BTD + beside(inner_BTD, self.dtype, self.target)
        return residual(x_BTD, y_BTD, self.target, around(adapter, self.dtype, self.target))


class Recurrent(Predictor):
    """A causal language model with a memory; see `Decoder` for the arguments.

    Embeddings are multiplied by the square root of the hidden size, and the output has a bias, as in the
    released code. That code's dropout inside the MLP, on the sinusoids and on the final features is omitted.
    """

    added: Added = NOTHING

    def __init__(
        self, model: TransformerXL, compute: Compute, target: Target, key: jax.Array, *, scanned: bool = True
    ) -> None:
        self.model, self.compute, self.target = model, compute, target
        keys, V, D = jax.random.split(key, 5), model.vocab_size, model.width
        plain = not model.cutoffs
        self.embed = Embedding(keys[0], V, D, std=0.02) if plain else Tables(keys[0], model, compute, target)
        self.biases = Biases(keys[1], model) if model.shared_biases else None

        def make(key: jax.Array) -> Layer:
            return Layer(key, model, compute, target)

        layers = jax.random.split(keys[2], model.layers)
        self.blocks = stacked(make, keys[2], model.layers) if scanned else nnx.List(map(make, layers))
        self.norm = None if model.norm_at == "post" else model_norm(model.blocks, target)
        self.head = Embedding(keys[3], V, D, std=0.02) if plain and not model.tied else None
        self.bias = nnx.Param(jnp.zeros(V), axes=("vocab",), role="bias") if plain else None
        self.adaptive = None if plain else AdaptiveSoftmax(keys[4], model, compute, target)

    @property
    def unembedding(self) -> Head:
        """A separate projection or the embedding, with a bias; or the adaptive softmax."""
        if self.adaptive is not None:
            return self.adaptive.over(cast(Tables, self.embed))
        weight = (self.head or cast(Embedding, self.embed)).weight[...]
        return Unembedding(weight, None if self.bias is None else self.bias[...])

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        dtype = self.target.stream_dtype(self.compute)
        x_BTD = self.embed(tokens_BT, dtype) * jnp.asarray(self.model.width**0.5, dtype)
        return constrain(x_BTD, "batch", "length", "features")

    def last(self, x_BTD: jax.Array) -> jax.Array:
        """Final features of the stream behind the last layer."""
        return (x_BTD if self.norm is None else self.norm(x_BTD)).astype(self.compute.dtype)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """Final features of rows, which follow `batch.memory` if there is one; a key turns dropout on.

        A token sees only its own document, in the memory too. Under `same_length` it sees as many tokens as
        the memory holds, including itself.
        """
        model, memory = self.model, batch.memory
        T, M = batch.tokens_BT.shape[1], 0 if memory is None else memory.segments_BM.shape[1]
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = dropout(self._embed(batch.tokens_BT), model.dropout, embed_key)
        segments_BS, per_layer = batch.segments_BT, {}
        if memory is not None:
            segments_BS = jnp.concatenate([memory.segments_BM, segments_BS], axis=1)
            x_BLMD = jax.lax.stop_gradient(memory.x_BLMD).astype(x_BTD.dtype)
            per_layer["memory"] = jnp.moveaxis(x_BLMD, 1, 0)
        if layers_key is not None and model.dropout:
            per_layer["key"] = jax.random.split(layers_key, model.layers)
        if self.added.adapters is not None:
            per_layer["adapters"] = self.added.adapters
        index_1S = jnp.arange(M + T)[None]
        window = (M or model.memory) if model.same_length else 0
        mask = Mask(index_1S[:, M:], index_1S, batch.segments_BT, segments_BS, window=window)
        sinusoid_ND = sinusoids(M + T, model.width, model.clamp)

        def call(
            layer: Layer, x_BTD: jax.Array, rows: tuple[Any, ...], given: dict[str, Any], _window: int
        ) -> tuple[jax.Array, Any]:
            keys_BSD = x_BTD
            if memory is not None:
                keys_BSD = jnp.concatenate([given["memory"], x_BTD], axis=1)
            kept_BMD = None if memory is None else jax.lax.stop_gradient(keys_BSD[:, T:])
            own = {"key": given.get("key"), "adapters": given.get("adapters")}
            y_BTD, _ = layer(x_BTD, keys_BSD, *rows, self.biases, **own)
            return y_BTD, kept_BMD

        rows, how = (mask, sinusoid_ND), (self.compute, self.target)
        x_BTD, kept_LBMD = run_layers(self.blocks, x_BTD, rows, per_layer, call, *how)
        if memory is not None:
            memory = Memory(jnp.moveaxis(kept_LBMD, 0, 1), segments_BS[:, T:])
        return Features(self.last(x_BTD), memory=memory)

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array | None, cache: Cache, prefix_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append tokens to every row of the cache and return their features; like `Decoder.decode`.

        A token sees what it would see as a segment of its own: itself and as many earlier tokens as the
        memory of evaluation holds, whatever else the call contains. Without a memory it sees all earlier
        tokens.
        """
        model, slots = self.model, slots_of(cache)
        start_B = jnp.zeros(len(tokens_BT), jnp.int32) if start_B is None else start_B
        index_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        slot_1S = jnp.arange(slots)[None]
        ones_BT, ones_1S = jnp.ones_like(index_BT), jnp.ones_like(slot_1S)
        window = decoding_window(model)
        mask = Mask(index_BT, slot_1S, ones_BT, ones_1S, window=window)
        sinusoid_ND = sinusoids(min(window or slots, slots), model.width, model.clamp)

        def call(
            layer: Layer, x_BTD: jax.Array, rows: tuple[Any, ...], own: Any, held: HeldLayer, place: int
        ) -> tuple[jax.Array, HeldLayer | None]:
            return layer(x_BTD, x_BTD, *rows, self.biases, held, start_B, adapters=own)

        x_BTD, cache = cached_layers(
            self.blocks, self._embed(tokens_BT), (mask, sinusoid_ND), self.added.adapters, cache, call
        )
        return self.last(x_BTD), cache
