"""Attention kernels for GPUs: cuDNN's, with a dense mask or with document boundaries, and tokamax's.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, K head size, M documents.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import backend

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.kernels.base import SELDOM, Kernel, Scores, spread, unfit
from jaxgpt.layers.mask import Mask, document_starts
from jaxgpt.target import Target

DOCUMENTS = 64
"""Documents per row and call of cuDNN's packed layout, which stores float32 [B M, H, T] for them."""
PACKED = {
    *("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"),
    *("mask_type", "scale", "sliding_window_length", "return_residual"),
}
"""The arguments that we pass to JAX's private cuDNN function."""
HOPPER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300")
"""Words in the device kinds of GPUs with compute capability 9.0 or higher."""


def _hopper(target: Target) -> bool:
    return any(name in target.device_kind.replace("-", " ").split() for name in HOPPER)


def _cudnn_problem(model: GPT, compute: Compute, target: Target) -> str:
    widest = 256 if _hopper(target) else 128
    if problem := unfit(model, target, "gpu"):
        return problem
    if compute.dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {compute.dtype}"
    if model.head % 8 or model.head > widest:
        return f"it needs a head size that is a multiple of 8 up to {widest} here, not {model.head}"
    if model.attention_softcap:
        return f"it does not support model.attention_softcap, which is {model.attention_softcap}"
    return ""


def cudnn(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    """NVIDIA's cuDNN through JAX's public function: no mask for one document per row, else a dense one."""
    how: Any = {"scale": scores.scale, "implementation": "cudnn"}
    T = q_BTHK.shape[1]
    if mask.layout == "one" and mask.causal and mask.prefix_BS is None:
        window = (mask.window - 1, 0) if mask.window else None
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, is_causal=True, local_window_size=window, **how
        )
    # With a mask, cuDNN requires even lengths. No query sees the added key.
    odd = ((0, 0), (0, T % 2), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, odd) for x in (q_BTHK, k_BSGK, v_BSGK))
    seen_B1TS = jnp.pad(mask.dense(), odd[:2] + odd[1:2])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen_B1TS, **how)[:, :T]


@functools.cache
def packed_attention() -> tuple[Any, str]:
    """JAX's private cuDNN attention with its packed layout: the module, or why it is not available."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        known = set(inspect.signature(module.dot_product_attention).parameters)
        types = {"PADDING", "PADDING_CAUSAL"} <= set(module.MaskType.__members__)
    except (ImportError, AttributeError) as error:
        return None, f"jax {jax.__version__} has moved cuDNN's packed layout ({error})"
    if lacking := sorted(PACKED - known) + ([] if types else ["MaskType.PADDING_CAUSAL"]):
        return None, f"cuDNN's packed layout in jax {jax.__version__} lacks {', '.join(lacking)}"
    return module, ""


def assume_device(device: Any) -> None:
    """Make JAX's cuDNN and tokamax, which check this process's own GPU, see a Hopper GPU.

    Only for a process that compiles for absent GPUs (`jaxgpt.aot`).
    """
    backend.get_default_device = lambda: device
    if module := packed_attention()[0]:
        module.check_compute_capability = lambda least: tuple(map(int, least.split("."))) <= (9, 0)


def _packed_problem(model: GPT, compute: Compute, target: Target) -> str:
    if problem := _cudnn_problem(model, compute, target):
        return problem
    if not _hopper(target):
        return f"it needs a Hopper or newer GPU, not {target.device_kind}"
    if model.prefix:
        return "it does not support model.prefix"
    return packed_attention()[1]


class Documents(NamedTuple):
    """The documents of packed rows in cuDNN's format; a run of padding counts as one document.

    Attributes:
      starts_BM: start of each document in its row [B, M + 1]; -1 beyond the last.
      tokens_BM: number of tokens of each document [B, M]; -1 beyond the last.
      number_BT: the document of each token; outside 0 to M - 1 if it is none of these.
    """

    starts_BM: jax.Array
    tokens_BM: jax.Array
    number_BT: jax.Array

    @classmethod
    def of(cls, segments_BT: jax.Array, most: int, first: jax.Array | int = 0) -> Documents:
        """Up to `most` documents of each row, starting at its document `first`."""
        (B, T), starts_BT = segments_BT.shape, document_starts(segments_BT)
        number_BT = jnp.cumsum(starts_BT, axis=1) - 1 - first
        beyond = most + 1  # a column that is dropped
        column_BT = jnp.where((number_BT >= 0) & (number_BT < most), number_BT, beyond)
        row_B1, place_BT = jnp.arange(B)[:, None], jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        first_BT = jnp.where(starts_BT, column_BT, beyond)
        starts_BM = jnp.full((B, most + 1), -1, jnp.int32).at[row_B1, first_BT].set(place_BT, mode="drop")
        tokens_BM = jnp.zeros((B, most), jnp.int32).at[row_B1, column_BT].add(1, mode="drop")
        return cls(starts_BM, jnp.where(starts_BM[:, :-1] < 0, -1, tokens_BM), number_BT)

    @property
    def listed_BT(self) -> jax.Array:
        """Which tokens belong to these documents."""
        return (self.number_BT >= 0) & (self.number_BT < self.tokens_BM.shape[1])

    def unpack(self, lse_NHT: jax.Array) -> jax.Array:
        """Rearrange cuDNN's values, indexed by document (all rows in one list) and position, to [B, T, H]."""
        count_B = jnp.sum(self.tokens_BM >= 0, axis=1)
        document_BT = (jnp.cumsum(count_B) - count_B)[:, None] + self.number_BT
        start_BT = jnp.take_along_axis(self.starts_BM, self.number_BT, axis=1)
        place_BT = jnp.arange(start_BT.shape[1]) - start_BT
        return lse_NHT[document_BT, :, place_BT]


def cudnn_packed(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    """NVIDIA's cuDNN with document boundaries, `DOCUMENTS` documents of each row at a time.

    Most rows have no more. If one has, its device runs further rounds, each as fast as the first. cuDNN
    leaves the outputs of other documents unwritten; they are never read.
    """
    module, _ = packed_attention()
    how = {"scale": scores.scale, "sliding_window_length": mask.window or None}
    how["return_residual"] = scores.residual

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> Any:
        out = module.dot_product_attention(q, k, v, mask_type=module.MaskType.CAUSAL, **how)
        return (out[0], out[1].swapaxes(1, 2)) if scores.residual else out

    def turn(number: jax.Array | int, given: Any, segments_BT: jax.Array) -> Any:
        them = Documents.of(segments_BT, DOCUMENTS, number * DOCUMENTS)
        bounds = {"q_seqlen": them.tokens_BM, "kv_seqlen": them.tokens_BM}
        bounds |= {"q_offsets": them.starts_BM, "kv_offsets": them.starts_BM}
        kind = module.MaskType.PADDING_CAUSAL if mask.causal else module.MaskType.PADDING
        out = module.dot_product_attention(*given, mask_type=kind, **bounds, **how)
        return ((out[0], them.unpack(out[1])) if scores.residual else out), them.listed_BT

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> Any:
        return _in_turns(turn, (q, k, v), segments_BT)

    run = one if mask.layout == "one" and mask.causal else rows
    return spread(run, q_BTHK, k_BSGK, v_BSGK, mask.q_segments_BT, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turns(turn: Callable[..., Any], given: Any, segments_BT: jax.Array) -> Any:
    """For each token, the result of its own round among `turn(0, given, segments)`, `turn(1, ...)` and so on.

    The number of rounds that the row with the most documents needs is known only on the device, so the
    gradient is a separate loop. It uses the residuals of the first round and recomputes those of further
    rounds.
    """
    return _further(lambda i: turn(i, given, segments_BT), turn(0, given, segments_BT)[0], segments_BT)


def _further(part: Callable[[jax.Array], Any], first: Any, segments_BT: jax.Array) -> Any:
    """`first`, overwritten by the results of all further rounds at the tokens that they list."""
    most = jnp.max(jnp.sum(document_starts(segments_BT), axis=1))

    def overwrite(i: jax.Array, so_far: Any) -> Any:
        new, listed_BT = part(i)

        def one(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(listed_BT.reshape(*listed_BT.shape, *(1,) * (new.ndim - 2)), new, old)

        return jax.tree.map(one, new, so_far)

    with jax.named_scope(SELDOM):
        return jax.lax.fori_loop(1, (most + DOCUMENTS - 1) // DOCUMENTS, overwrite, first)


def _in_turns_forward(turn: Callable[..., Any], given: Any, segments_BT: jax.Array) -> tuple[Any, Any]:
    first, back, _ = jax.vjp(lambda given: turn(0, given, segments_BT), given, has_aux=True)
    y = _further(lambda i: turn(i, given, segments_BT), first, segments_BT)
    return y, (back, given, segments_BT)


def _in_turns_backward(turn: Callable[..., Any], kept: Any, dy: Any) -> tuple[Any, None]:
    back, given, segments_BT = kept

    def part(i: jax.Array) -> Any:
        _, back, listed_BT = jax.vjp(lambda given: turn(i, given, segments_BT), given, has_aux=True)
        return back(dy)[0], listed_BT

    return _further(part, back(dy)[0], segments_BT), None


_in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def _tokamax_problem(model: GPT, compute: Compute, target: Target) -> str:
    if problem := unfit(model, target, "gpu"):
        return problem
    if not _hopper(target):
        return f"it needs a Hopper or newer GPU, not {target.device_kind}"
    if compute.dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {compute.dtype}"
    if model.prefix or not model.causal:
        return "it supports only causal models without a prefix"
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed; pip install tokamax"
    return tokamax_kernel()[1]


@functools.cache
def tokamax_kernel() -> tuple[Any, str]:
    """Tokamax's private Mosaic kernel and its mask: (kernel, mask), or why they are not available."""
    try:
        api = importlib.import_module("tokamax._src.ops.attention.api")  # slow to import
        base = importlib.import_module("tokamax._src.ops.attention.base")
        return (api.IMPLEMENTATIONS["mosaic_gpu"], base.Mask), ""
    except (ImportError, AttributeError, KeyError) as error:
        return None, f"tokamax has no mosaic_gpu kernel here ({type(error).__name__}: {error})"


def tokamax(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    """Tokamax's Mosaic kernel, given the first key that each query sees."""
    kernel, bounds = tokamax_kernel()[0]

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> jax.Array:
        place_T = jnp.arange(q.shape[1], dtype=jnp.int32)
        first_BT = jax.lax.cummax(jnp.where(document_starts(segments_BT), place_T, 0), axis=1)
        if mask.window:
            first_BT = jnp.maximum(first_BT, place_T - mask.window + 1)
        seen = bounds(k_start=first_BT[:, None], is_causal=True)
        return kernel(q, k, v, mask=seen, logits_scale=scores.scale, logits_soft_cap=scores.cap)

    return spread(rows, q_BTHK, k_BSGK, v_BSGK, mask.q_segments_BT, scores)


CUDNN = Kernel(
    _cudnn_problem,
    cudnn,
    alone="JAX rounds cuDNN's log-sum-exp to bfloat16",
    note="packed rows need a length x length mask",
)
CUDNN_PACKED = Kernel(_packed_problem, cudnn_packed)
TOKAMAX = Kernel(_tokamax_problem, tokamax, alone="tokamax has no gradient for its log-sum-exp")
