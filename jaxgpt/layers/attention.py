"""Attention: one function that picks a kernel, and the module around it.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, R = H / G, K head width, D width.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT, Compute, UserError, require
from jaxgpt.layers.cache import LayerCache
from jaxgpt.layers.linear import Linear
from jaxgpt.layers.norm import Norm
from jaxgpt.layers.position import rotate

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, kept as its causes so that a kernel can use them directly.

    Attributes:
      q_index_BT, k_index_BS: place of each query and key in its row.
      q_segments_BT, k_segments_BS: document numbers; a query sees its own document only.
      causal: whether later keys are hidden.
    """

    q_index_BT: jax.Array
    k_index_BS: jax.Array
    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    causal: bool = field(default=True, metadata={"static": True})

    def dense(self, window: jax.Array | int | None = None) -> jax.Array:
        """The mask as booleans [B, T, S]; every query sees at least itself.

        Args:
          window: tokens back that a query sees, itself included; may be traced. None means all.
        """
        require(
            self.causal or window is None,
            "a sliding window needs a causal mask; set model.causal=True or model.windows=().",
        )
        seen_BTS = self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
        back_BTS = self.q_index_BT[:, :, None] - self.k_index_BS[:, None, :]
        if self.causal:
            seen_BTS &= back_BTS >= 0
        if window is not None:
            seen_BTS &= back_BTS < window
        return seen_BTS


@functools.cache
def pick_kernel(model: GPT, compute: Compute) -> str:
    """The attention kernel for this machine, `xla` or `cudnn`, logged with its reason.

    Raises:
      UserError: under `compute.strict`, when the kernel asked for cannot run here.
    """
    problem = None
    if jax.default_backend() != "gpu":
        problem = f"it needs a GPU, not {jax.default_backend()}"
    elif compute.dtype != "bfloat16":
        problem = f"it needs compute.dtype bfloat16, not {compute.dtype}"
    elif model.head % 8 or model.head > 128:
        problem = f"it needs a head width that is a multiple of 8 up to 128, not {model.head}"
    if compute.attention == "cudnn" and problem and compute.strict:
        raise UserError(f"compute.attention is 'cudnn' but {problem}; use 'xla' or strict=False.")
    kernel = "xla" if compute.attention == "xla" or problem else "cudnn"
    if compute.attention == "cudnn" and problem:
        log.warning("attention kernel: xla instead of cudnn, because %s", problem)
    elif compute.attention == "auto":
        log.info("attention kernel: %s%s", kernel, f" (not cudnn: {problem})" if problem else "")
    return kernel


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
    kernel: str = "xla",
) -> jax.Array:
    """Softmax attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023).

    Args:
      q_BTHK: queries; H is a multiple of G.
      k_BSGK, v_BSGK: keys and values.
      mask_BTS: True where a query sees a key; every query must see at least one.
      kernel: `xla`, or `cudnn` (flash attention; gradients stay in the input's type).

    Returns:
      [B, T, H, K], of the type of the queries.
    """
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None], implementation="cudnn"
        )
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * K**-0.5
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    # A finite floor: gradients of -inf would be NaN.
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    y_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", probs, v_BSGK)
    return y_BTGRK.reshape(B, T, H, K).astype(q_BTHK.dtype)


class Attention(nnx.Module):
    """Self-attention with its projections; serves training, prefill and cached decoding alike."""

    def __init__(self, key: jax.Array, model: GPT, compute: Compute) -> None:
        D, H, G, K = model.width, model.heads, model.groups, model.head
        dtype = jnp.dtype(compute.dtype)
        keys = jax.random.split(key, 4)

        def into_heads(key: jax.Array, count: int, name: str) -> Linear:
            axes = ("embed", name, "head")
            return Linear(key, (D,), (count, K), axes, bias=model.bias, std=0.02, dtype=dtype)

        self.q = into_heads(keys[0], H, "heads")
        self.k = into_heads(keys[1], G, "kv_heads")
        self.v = into_heads(keys[2], G, "kv_heads")
        # GPT-2, section 2.3: residual projections start smaller by sqrt(2 x layers).
        std = 0.02 * (2 * model.layers) ** -0.5
        out_axes = ("heads", "head", "embed")
        self.out = Linear(keys[3], (H, K), (D,), out_axes, bias=model.bias, std=std, dtype=dtype)
        self.q_norm = Norm(K, "rmsnorm", model.norm_eps) if model.qk_norm else None
        self.k_norm = Norm(K, "rmsnorm", model.norm_eps) if model.qk_norm else None
        self.theta = model.rope_theta if model.position == "rope" else None
        self.kernel = pick_kernel(model, compute)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask_BTS: jax.Array,
        cache: LayerCache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend within x, or over a cache to which x is appended at slots `start_B` first.

        Returns:
          [B, T, D], and the cache with the new tokens (None without one).
        """
        q_BTHK, k_BTGK, v_BTGK = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.theta is not None:
            q_BTHK = rotate(q_BTHK, positions_BT, self.theta)
            k_BTGK = rotate(k_BTGK, positions_BT, self.theta)
        if cache is None:
            y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, mask_BTS, self.kernel)
        else:
            assert start_B is not None
            cache = cache.append(k_BTGK, v_BTGK, start_B)
            y_BTHK = attend(q_BTHK, cache.k_BSGK, cache.v_BSGK, mask_BTS)
        return self.out(y_BTHK), cache
