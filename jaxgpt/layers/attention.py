"""Attention: one function that picks a kernel, and the module around it.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, R = H / G, K head width, D width.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.config import GPT, Compute, require
from jaxgpt.layers.cache import HeldLayer
from jaxgpt.layers.linear import Linear, softcap
from jaxgpt.layers.norm import model_norm
from jaxgpt.layers.position import Bias, rotate
from jaxgpt.sharding import spec
from jaxgpt.target import Target

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, kept as its causes so that a kernel can use them directly.

    Attributes:
      q_index_BT, k_index_BS: place of each query and key in its row.
      q_segments_BT, k_segments_BS: document numbers; a query sees its own document only.
      causal: whether later keys are hidden.
      prefix_BS: keys of a prompt, which their whole document sees whatever their place; None for none.
      window: tokens back that a query sees, itself included, 0 means all.
    """

    q_index_BT: jax.Array
    k_index_BS: jax.Array
    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    prefix_BS: jax.Array | None = None
    causal: bool = field(default=True, metadata={"static": True})
    window: int = field(default=0, metadata={"static": True})

    def dense(self, window: jax.Array | int | None = None) -> jax.Array:
        """The mask as booleans [B, T, S]; every query sees at least itself.

        Args:
          window: in place of the mask's own; may be traced, as it is where layers differ.
        """
        window = (self.window or None) if window is None else window
        require(
            self.causal or window is None,
            "a sliding window needs a causal mask; set model.causal=True or model.windows=().",
        )
        seen_BTS = self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        back_BTS = self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]
        if self.causal:
            ahead_BTS = back_BTS < 0
            seen_BTS &= ~ahead_BTS if self.prefix_BS is None else ~ahead_BTS | self.prefix_BS[:, None]
        if window is not None:
            seen_BTS &= back_BTS < window
        return seen_BTS

    def distance(self) -> jax.Array:
        """How far back each key lies from each query [B, T, S] (or [1, T, S] where rows are alike)."""
        return self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]


class Seen(NamedTuple):
    """A dense mask, and what biases by distance need.

    Attributes:
      mask_BTS: True where a query sees a key.
      distance_BTS: places back from query to key; None where no layer asks.
    """

    mask_BTS: jax.Array
    distance_BTS: jax.Array | None = None


FASTEST = {"gpu": "cudnn", "tpu": "splash"}
"""The kernel of each platform that never holds all scores at once; elsewhere it is `xla`."""
LANES = 128
"""Rows of a tile of the TPU's vector unit; splash attention takes lengths that are multiples of it."""


@functools.cache
def pick_kernel(model: GPT, compute: Compute, target: Target) -> str:
    """The attention kernel for a target: `xla`, `cudnn` or `splash`, logged where there was a choice.

    Raises:
      UserError: under `compute.strict`, when the kernel asked for, or under `auto` the platform's
        fastest, cannot run here.
    """
    wanted, asked = compute.attention, compute.attention
    if asked == "auto":
        wanted = FASTEST.get(target.platform, "xla")
    problem = _problem(wanted, model, compute, target)
    require(
        not (problem and compute.strict),
        f"compute.attention is {asked!r} but {wanted} cannot run here: {problem}; use 'xla' or strict=False.",
    )
    if problem:
        log.warning("attention kernel: xla instead of %s, because %s", wanted, problem)
    elif asked == "auto":
        log.info("attention kernel: %s", wanted)
    return "xla" if problem else wanted


def _problem(kernel: str, model: GPT, compute: Compute, target: Target) -> str:
    """Why the kernel cannot run here, or nothing."""
    platform = next((name for name, fastest in FASTEST.items() if fastest == kernel), "")
    if platform and target.platform != platform:
        return f"it needs a {platform.upper()}, not a {target.platform.upper()}"
    if kernel == "cudnn" and compute.dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {compute.dtype}"
    if kernel == "cudnn" and (model.head % 8 or model.head > 128):
        return f"it needs a head width that is a multiple of 8 up to 128, not {model.head}"
    if kernel in ("cudnn", "splash") and model.position in ("alibi", "relative"):
        return f"it takes no bias, as model.position {model.position!r} adds"
    if kernel in ("cudnn", "splash") and model.attention_softcap:
        return f"it caps no scores, as model.attention_softcap {model.attention_softcap} does"
    if kernel == "splash" and model.prefix:
        return "it knows no prefix, as model.prefix has"
    if kernel == "splash" and len(set(model.windows)) > 1:
        return f"it needs the same window in every layer, not model.windows {model.windows}"
    return ""


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask | jax.Array,
    kernel: str = "xla",
    *,
    scale: float | None = None,
    bias_BHTS: jax.Array | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023).

    Args:
      q_BTHK: queries; H is a multiple of G.
      k_BSGK, v_BSGK: keys and values.
      mask: [B, T, S], True where a query sees a key; every query must see at least one. For
        `splash` the `Mask` itself, of queries and keys that are the same tokens in a row's order.
      kernel: `xla`; `cudnn` (flash attention on GPUs; gradients stay in the input's type); or
        `splash` (block-sparse flash attention on TPUs).
      scale: multiplies the scores; None means K^-1/2.
      bias_BHTS: added to the scores, float32 (`xla` alone).
      cap: soft-cap of the scores, before the bias (`xla` alone).
      interpret: run a Pallas kernel in its interpreter.

    Returns:
      [B, T, H, K], of the type of the queries.
    """
    B, T, H, K = q_BTHK.shape
    scale = K**-0.5 if scale is None else scale
    if isinstance(mask, Mask):
        return _splash(q_BTHK * scale, k_BSGK, v_BSGK, mask, interpret)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, mask=mask[:, None], scale=scale, implementation="cudnn"
        )
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * scale
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores = softcap(scores, cap)
    if bias_BHTS is not None:
        scores = scores + bias_BHTS.reshape(-1, G, H // G, *bias_BHTS.shape[2:])
    # A finite floor: gradients of -inf would be NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    y_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", probs, v_BSGK)
    return y_BTGRK.reshape(B, T, H, K).astype(q_BTHK.dtype)


def _splash(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask: Mask, interpret: bool
) -> jax.Array:
    """Attention of scaled queries by JAX's TPU kernel, which skips the blocks that causality and window hide.

    The partitioner cannot split a kernel, so every device is told to run it on its own rows and
    heads.
    """
    T = q_BTHK.shape[1]
    padding = ((0, 0), (0, -T % LANES), (0, 0), (0, 0))
    q, k, v = (
        jnp.pad(x, padding).swapaxes(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)
    )  # fmt: skip
    segments_BT = jnp.pad(mask.q_segments_BT, padding[:2], constant_values=-1)
    heads, groups = (spec(("batch", name, "length", "head")) for name in ("heads", "kv_heads"))
    how = {"causal": mask.causal, "window": mask.window, "interpret": interpret}
    run = functools.partial(_splash_rows, **how)
    if not jax.sharding.get_abstract_mesh().empty:
        layouts = (heads, groups, groups, spec(("batch", "length")))
        run = jax.shard_map(run, in_specs=layouts, out_specs=heads, check_vma=False)
    return run(q, k, v, segments_BT).swapaxes(1, 2)[:, :T]


def _splash_rows(
    q_BHTK: jax.Array,
    k_BGTK: jax.Array,
    v_BGTK: jax.Array,
    segments_BT: jax.Array,
    *,
    causal: bool,
    window: int,
    interpret: bool,
) -> jax.Array:
    """The kernel on the rows and heads of one device; T is a multiple of `LANES`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    H, T = q_BHTK.shape[1:3]
    back = window - 1 if window else None
    seen = splash.LocalMask((T, T), (back, 0), 0) if causal else splash.FullMask((T, T))
    block = next(size for size in (512, 256, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([seen] * H), block_sizes=sizes, interpret=interpret
    )
    return jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, splash.SegmentIds(segments_BT, segments_BT))


class Attention(nnx.Module):
    """Self-attention with its projections; serves training, prefill and cached decoding alike."""

    def __init__(self, key: jax.Array, model: GPT, compute: Compute, target: Target) -> None:
        D, H, G, K = model.width, model.heads, model.groups, model.head
        dtype = jnp.dtype(compute.dtype)
        keys = jax.random.split(key, 4)
        bias = model.bias if model.qkv_bias is None else model.qkv_bias

        def into_heads(key: jax.Array, count: int, name: str) -> Linear:
            axes = ("embed", name, "head")
            how = {"bias": bias, "std": 0.02, "dtype": dtype, "target": target}
            return Linear(key, (D,), (count, K), axes, **how)

        self.q = into_heads(keys[0], H, "heads")
        self.k = into_heads(keys[1], G, "kv_heads")
        self.v = into_heads(keys[2], G, "kv_heads")
        # GPT-2, section 2.3: residual projections start smaller by sqrt(2 x layers).
        std = 0.02 * (2 * model.layers) ** -0.5
        out_axes = ("heads", "head", "embed")
        self.out = Linear(
            keys[3], (H, K), (D,), out_axes, bias=model.bias, std=std, dtype=dtype, target=target
        )
        self.q_norm = model_norm(model, target, K, "rmsnorm") if model.qk_norm else None
        self.k_norm = model_norm(model, target, K, "rmsnorm") if model.qk_norm else None
        biased = model.position in ("alibi", "relative")
        self.bias = Bias(jax.random.fold_in(key, 4), model) if biased else None
        self.scale = (model.attention_scalar or K) ** -0.5
        self.cap = model.attention_softcap
        self.kernel, self.interpret = pick_kernel(model, compute, target), target.interpret

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        seen: Mask | Seen,
        frequency_K: jax.Array | np.ndarray | None = None,
        cache: HeldLayer | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, HeldLayer | None]:
        """Attend within x, or over a cache to which x is appended at slots `start_B` first.

        Args:
          x_BTD: features.
          positions_BT: of the tokens in their documents, for rotary embedding.
          seen: who sees whom; the `Mask` itself for `splash`.
          frequency_K: of the rotary embedding; None for none.
          cache, start_B: see above.

        Returns:
          [B, T, D], and the cache with the new tokens (None without one).
        """
        q_BTHK, k_BTGK, v_BTGK = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if frequency_K is not None:
            q_BTHK = rotate(q_BTHK, positions_BT, frequency_K)
            k_BTGK = rotate(k_BTGK, positions_BT, frequency_K)
        mask = seen if isinstance(seen, Mask) else seen.mask_BTS
        bias_BHTS = None
        if self.bias is not None:
            assert isinstance(seen, Seen) and seen.distance_BTS is not None, "pick_kernel sees to it"
            bias_BHTS = self.bias(seen.distance_BTS)
        how = {"scale": self.scale, "bias_BHTS": bias_BHTS, "cap": self.cap}
        if cache is None:
            y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, mask, self.kernel, interpret=self.interpret, **how)
        else:
            assert start_B is not None
            cache = cache.append(k_BTGK, v_BTGK, start_B)
            y_BTHK = attend(q_BTHK, cache.k_BSGK, cache.v_BSGK, mask, **how)
        return self.out(y_BTHK), cache
