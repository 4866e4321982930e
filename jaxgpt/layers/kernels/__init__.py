"""The table of attention kernels: name -> why it cannot run for a model and target, and how it runs.

All take the same queries, keys, values, `Mask` and `Scores`; only `xla` supports every combination. The order
of the table is the order of fallback; docs/adr/0003 gives the reasons.

Shapes: B batch, T queries, S keys, P extra keys, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import GPT, Compute
from jaxgpt.errors import require
from jaxgpt.layers.kernels.base import Kernel, Scores, plain, probabilities
from jaxgpt.layers.kernels.gpu import CUDNN, CUDNN_PACKED, TOKAMAX
from jaxgpt.layers.kernels.tpu import SPLASH
from jaxgpt.layers.mask import Mask
from jaxgpt.layers.tape import tape
from jaxgpt.target import Target

log = logging.getLogger(__name__)

FASTEST = {"gpu": "cudnn_packed", "tpu": "splash"}
"""First choice of `auto` by platform; elsewhere it is `xla`."""
KERNELS: dict[str, Kernel] = {
    "tokamax": TOKAMAX,
    "cudnn_packed": CUDNN_PACKED,
    "cudnn": CUDNN,
    "splash": SPLASH,
    "xla": Kernel(lambda *_: "", plain),
}


@functools.cache
def pick_kernel(model: GPT, compute: Compute, target: Target, *, extra: bool = False) -> str:
    """The attention kernel for a target, a name in `KERNELS`; logged if there was a choice.

    Args:
      model, compute, target: arguments of a kernel's `problem`.
      extra: whether there are extra keys, whose result is merged with the kernel's.

    Raises:
      UserError: under `compute.strict`, if the requested kernel (under `auto`, the platform's fastest)
        cannot run here.
    """
    asked = compute.attention
    wanted = FASTEST.get(target.platform, "xla") if asked == "auto" else asked
    names = list(KERNELS)
    problems = {n: _problem(n, model, compute, target, extra) for n in names[names.index(wanted) :]}
    name, problem = next(n for n, why in problems.items() if not why), problems[wanted]
    require(
        not (problem and compute.strict),
        f"compute.attention is {asked!r} but {wanted} cannot run here: {problem}; use 'xla' or strict=False.",
    )
    said = name + (f" ({KERNELS[name].note})" if KERNELS[name].note else "")
    if problem:
        log.warning("attention kernel: %s instead of %s, because %s", said, wanted, problem)
    elif asked == "auto":
        log.info("attention kernel: %s", said)
    return name


def _problem(name: str, model: GPT, compute: Compute, target: Target, extra: bool) -> str:
    kernel = KERNELS[name]
    if problem := kernel.problem(model, compute, target):
        return problem
    if name == "xla" or not extra:
        return ""
    # The gradient of the log-sum-exp weights keys by their probability; a soft-cap breaks this.
    capped = "it has no gradient for the log-sum-exp of capped scores"
    return kernel.alone or (capped if model.attention_softcap else "")


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    scores: Scores,
    kernel: str = "xla",
    extra: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023).

    Args:
      q_BTHK: queries; H is a multiple of G.
      k_BSGK, v_BSGK: keys and values.
      mask: which keys each query sees; every query must see at least one. Kernels other than `xla` need a
        mask with a known layout.
      scores: how scores are computed.
      kernel: a name in `KERNELS`, from `pick_kernel`.
      extra: more keys and values [B, P, G, K] (or [1, P, G, K]), which every query sees. They are
        attended to separately, and the log-sum-exps of the scores merge both results.

    Returns:
      [B, T, H, K], in the type of the queries.
    """
    run, seen = KERNELS[kernel].run, tape()
    if seen is not None and seen.wants_map:
        seen.attention_BHTS[seen.layers] = probabilities(q_BTHK, k_BSGK, mask, scores)
    if extra is None:
        return run(q_BTHK, k_BSGK, v_BSGK, mask, scores)
    (B, T), P, both = q_BTHK.shape[:2], extra[0].shape[1], replace(scores, residual=True)
    if kernel == "xla":
        y_BTHK, lse_BTH = run(q_BTHK, k_BSGK, v_BSGK, mask, both)
    else:
        causes, structure = jax.tree.flatten(mask)

        def one(q: jax.Array, k: jax.Array, v: jax.Array, causes: list[jax.Array], scores: Scores) -> Any:
            return run(q, k, v, jax.tree.unflatten(structure, causes), scores)

        y_BTHK, lse_BTH = _with_lse(one, scores, q_BTHK, k_BSGK, v_BSGK, causes)
    k_BPGK, v_BPGK = (jnp.broadcast_to(x, (B, *x.shape[1:])).astype(k_BSGK.dtype) for x in extra)
    at_T, at_P = jnp.zeros((1, T), jnp.int32), jnp.zeros((1, P), jnp.int32)
    everyone = Mask(at_T, at_P, at_T, at_P, causal=False)
    more_BTHK, more_BTH = plain(q_BTHK, k_BPGK, v_BPGK, everyone, replace(both, bias=None))
    share_BTH1 = jax.nn.sigmoid(lse_BTH - more_BTH)[..., None]
    if seen is not None and seen.wants_map:  # the rest goes to the extra keys
        seen.attention_BHTS[seen.layers] *= share_BTH1.swapaxes(1, 2)
    return (share_BTH1 * y_BTHK + (1 - share_BTH1) * more_BTHK).astype(q_BTHK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_lse(
    run: Callable[..., Any],
    scores: Scores,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causes: list[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """A kernel's result and log-sum-exp, both differentiable.

    Flash kernels drop the gradient of their log-sum-exp. But its derivative by a score is the key's
    probability, so its gradient is attention with the keys as values.
    """
    return run(q, k, v, causes, replace(scores, residual=True))


def _with_lse_forward(run: Any, scores: Scores, *given: Any) -> tuple[Any, Any]:
    return _with_lse(run, scores, *given), given


def _with_lse_backward(run: Any, scores: Scores, given: Any, cotangents: Any) -> tuple[Any, ...]:
    (q, k, v, causes), (dy, dlse) = given, cotangents
    _, back = jax.vjp(lambda q, k, v: run(q, k, v, causes, scores), q, k, v)
    dq, dk, dv = back(dy)
    mean_BTHK, back = jax.vjp(lambda values: run(q, k, values, causes, scores), k)
    weight_BTH1 = scores.scale * dlse[..., None]
    dq += (weight_BTH1 * mean_BTHK).astype(q.dtype)
    dk += back((weight_BTH1 * q).astype(q.dtype))[0]
    return dq, dk, dv, None


_with_lse.defvjp(_with_lse_forward, _with_lse_backward)
