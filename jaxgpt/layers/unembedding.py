"""From features to logits, losses and log-probabilities: the output projection and its results.

The projection and the softmax are computed together, one chunk of tokens at a time, so that the logits
of a whole batch never exist. On a mesh, every device processes its own rows: the projection is
gathered once before the first chunk, and its gradient is reduced once after the last.

Shapes: B rows, T tokens per row, D hidden size, V vocabulary, N chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxgpt.config import ROW_AXES
from jaxgpt.layers.linear import softcap, unembed
from jaxgpt.layers.truncation import upper_set
from jaxgpt.sharding import row_shards

H = TypeVar("H", bound="Head")


class Drawn(NamedTuple):
    """How tokens were drawn from a model's distribution, as the sampler does (static).

    Attributes:
      temperature: divides the logits.
      vocab: ids from here on are never drawn.
    """

    temperature: float
    vocab: int

    def logits(self, logits_BTV: jax.Array, targets_BT: jax.Array, kept_BT: jax.Array | None) -> jax.Array:
        """Those of the distribution drawn from: -inf where a token cannot be.

        Truncation keeps the `kept_BT` most likely tokens, and always the target. So the set is that of the
        sampler, and a token at its border that rounding exchanges for its neighbour changes nothing much.
        """
        scores_BTV, V = logits_BTV / self.temperature, logits_BTV.shape[-1]
        if self.vocab < V:
            scores_BTV = jnp.where(jnp.arange(V) < self.vocab, scores_BTV, -jnp.inf)
        if kept_BT is None:
            return scores_BTV
        flat_NV = scores_BTV.reshape(-1, V)
        keep_NV = upper_set(flat_NV, jnp.ones_like(flat_NV), kept_BT.reshape(-1).astype(jnp.float32))
        is_target_BTV = jnp.arange(V) == targets_BT[..., None]
        return jnp.where(keep_NV.reshape(logits_BTV.shape) | is_target_BTV, scores_BTV, -jnp.inf)


class Scores(NamedTuple):
    """A head's scores of targets.

    Attributes:
      logprob_BT: log-probability of each target.
      log_z_BT: log-partition of the logits.
      correct_BT: whether the target was the top-1 prediction.
      entropy_BT: of the distribution in nats, where tokens were drawn from it; else None.
    """

    logprob_BT: jax.Array
    log_z_BT: jax.Array
    correct_BT: jax.Array
    entropy_BT: jax.Array | None = None


class Losses(NamedTuple):
    """Sums over targets: `loss` in nats, `nll` (the loss without z-loss) and `correct` top-1 predictions.

    The last two carry no gradient.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array


Pull = Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]]
"""From gradients by `logprob_BT` and `log_z_BT` to those by the head (a float32 head) and by x_BTD."""


class Head:
    """Predicts from features: a pytree of parameters, which belong to the modules of a model."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of features [..., D]."""
        raise NotImplementedError

    def score(
        self,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        drawn: Drawn | None = None,
        kept_BT: jax.Array | None = None,
    ) -> tuple[Scores, Pull]:
        """Scores of a few targets, with all their logits at once, and the backward function.

        Args:
          x_BTD: features.
          targets_BT: ids.
          drawn: of what distribution, if not of the model's own.
          kept_BT: with `drawn`, how many tokens truncation kept at each place; None where there was none.
        """
        raise NotImplementedError

    def losses(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float, chunk: int
    ) -> Losses:
        """See `cross_entropy`."""
        return cross_entropy(self, x_BTD, targets_BT, weights_BT, z_loss, chunk)

    def logprobs(self, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
        """See `target_logprobs`."""
        return target_logprobs(self, x_BTD, targets_BT, chunk)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unembedding(Head):
    """Logits `softcap(x . weight^T + bias)`.

    Attributes:
      weight: [V, D], a separate projection or the embedding table.
      bias: [V], or None.
      cap: logit soft-cap (Gemma 2, section 2), or None.
    """

    weight: Any
    bias: Any = None
    cap: float | None = field(default=None, metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = unembed(x, self.weight)
        return softcap(logits if self.bias is None else logits + self.bias, self.cap)

    def score(
        self,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        drawn: Drawn | None = None,
        kept_BT: jax.Array | None = None,
    ) -> tuple[Scores, Pull]:
        logits_BTV = self(x_BTD)
        scores_BTV = logits_BTV if drawn is None else drawn.logits(logits_BTV, targets_BT, kept_BT)
        top_BT = scores_BTV.max(-1)
        unnormalised_BTV = jnp.exp(scores_BTV - top_BT[..., None])
        total_BT = unnormalised_BTV.sum(-1)
        log_z_BT = top_BT + jnp.log(total_BT)
        hit_BT = jnp.take_along_axis(scores_BTV, targets_BT[..., None], axis=-1)[..., 0]
        entropy_BT = None
        if drawn is not None:
            below_BTV = jnp.where(unnormalised_BTV > 0, scores_BTV - top_BT[..., None], 0)
            entropy_BT = jnp.log(total_BT) - jnp.sum(unnormalised_BTV * below_BTV, -1) / total_BT

        def pull(dlogprob_BT: jax.Array, dlog_z_BT: jax.Array) -> tuple[Unembedding, jax.Array]:
            share_BT = (dlog_z_BT - dlogprob_BT) / total_BT
            is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
            dlogits_BTV = unnormalised_BTV * share_BT[..., None] + dlogprob_BT[..., None] * is_target_BTV
            if drawn is not None:
                dlogits_BTV /= drawn.temperature
            return self.back(x_BTD, logits_BTV, dlogits_BTV)

        return Scores(hit_BT - log_z_BT, log_z_BT, hit_BT >= top_BT, entropy_BT), pull

    def back(
        self, x_BTD: jax.Array, logits_BTV: jax.Array, dlogits_BTV: jax.Array
    ) -> tuple[Unembedding, jax.Array]:
        """Gradients by the parameters (float32) and by the features, of those by the logits."""
        w_VD = self.weight.astype(x_BTD.dtype)
        if self.cap is not None:
            dlogits_BTV *= 1 - jnp.square(logits_BTV / self.cap)
        db_V = None if self.bias is None else jnp.sum(dlogits_BTV, (0, 1))
        dlogits_BTV = dlogits_BTV.astype(w_VD.dtype)
        dims = (((0, 1), (0, 1)), ((), ()))
        dw_VD = jax.lax.dot_general(dlogits_BTV, x_BTD, dims, preferred_element_type=jnp.float32)
        return Unembedding(dw_VD, db_V, self.cap), dlogits_BTV @ w_VD


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    z_loss: float,
    chunk: int,
) -> Losses:
    """Weighted sums of the targets' losses, `chunk` tokens per device at a time.

    A target's contribution to the gradients is known as soon as its logits are. So differentiation computes
    the gradients in the forward pass, chunk by chunk, and no logits are computed twice.

    Args:
      head: makes the predictions.
      x_BTD: features.
      targets_BT: token ids.
      weights_BT: weight of each target; gets no gradient.
      z_loss: weight of the squared log-partition (PaLM, section 5).
      chunk: maximum number of tokens per device whose logits are held at a time.
    """
    return _sums(sweep(head, x_BTD, targets_BT, chunk), weights_BT, z_loss)


def _sums(scores: Scores, weights_BT: jax.Array, z_loss: float) -> Losses:
    nll = -jnp.sum(weights_BT * scores.logprob_BT)
    loss = nll + z_loss * jnp.sum(weights_BT * jnp.square(scores.log_z_BT))
    return Losses(loss, nll, jnp.sum(weights_BT * scores.correct_BT))


def _losses(head, x_BTD, targets_BT, weights_BT, z_loss, chunk):  # noqa: ANN001, ANN202
    def slopes(scores: Scores, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return -weights_BT, 2 * z_loss * weights_BT * scores.log_z_BT

    scores, *grads = sweep_back(head, x_BTD, targets_BT, chunk, slopes, weights_BT)
    return _sums(scores, weights_BT, z_loss), grads


def _losses_back(z_loss, chunk, grads, cotangents):  # noqa: ANN001, ANN202
    return *jax.tree.map(lambda g: (g * cotangents.loss).astype(g.dtype), grads), None, None


cross_entropy.defvjp(_losses, _losses_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def target_logprobs(
    head: Head, x_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """Log-probability of each target, for losses that are not sums over targets; else like `cross_entropy`.

    The gradients by them are known only in the backward pass, which recomputes all logits.
    """
    return sweep(head, x_BTD, targets_BT, chunk).logprob_BT


def _logprobs(head, x_BTD, targets_BT, chunk):  # noqa: ANN001, ANN202
    return sweep(head, x_BTD, targets_BT, chunk).logprob_BT, (head, x_BTD, targets_BT)


def _logprobs_back(chunk, saved, dlogprob_BT):  # noqa: ANN001, ANN202
    def slopes(scores: Scores, dlogprob_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return dlogprob_BT, jnp.zeros_like(dlogprob_BT)

    head, x_BTD, targets_BT = saved
    _, *grads = sweep_back(head, x_BTD, targets_BT, chunk, slopes, dlogprob_BT)
    return *grads, None


target_logprobs.defvjp(_logprobs, _logprobs_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def drawn_logprobs(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    kept_BT: Int[Array, "B T"] | None,
    drawn: Drawn,
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Like `target_logprobs`, of the distribution that the sampler draws from; and its entropy in nats.

    The entropy gets no gradient, nor does the set that truncation keeps.
    """
    return _drawn(head, x_BTD, targets_BT, kept_BT, drawn, chunk)[0]


def _drawn(head, x_BTD, targets_BT, kept_BT, drawn, chunk):  # noqa: ANN001, ANN202
    scores = sweep(head, x_BTD, targets_BT, chunk, drawn, kept_BT)
    both: Any = scores.logprob_BT, scores.entropy_BT
    return both, (head, x_BTD, targets_BT, kept_BT)


def _drawn_back(drawn, chunk, saved, cotangents):  # noqa: ANN001, ANN202
    def slopes(scores: Scores, dlogprob_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return dlogprob_BT, jnp.zeros_like(dlogprob_BT)

    head, x_BTD, targets_BT, kept_BT = saved
    more = (drawn, kept_BT)
    _, *grads = sweep_back(head, x_BTD, targets_BT, chunk, slopes, cotangents[0], *more)
    return *grads, None, None


drawn_logprobs.defvjp(_drawn, _drawn_back)


def sweep(
    head: Head,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    drawn: Drawn | None = None,
    kept_BT: jax.Array | None = None,
) -> Scores:
    """Scores of all targets, `chunk` tokens per device at a time; see `Head.score`."""

    def one(head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *kept: jax.Array) -> Scores:
        return head.score(x_BTD, targets_BT, *_how(drawn, kept))[0]

    return over_rows(one, chunk, head, x_BTD, targets_BT, *_given(kept_BT))


def _how(drawn: Drawn | None, kept: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    return () if drawn is None else (drawn, *kept)


def _given(kept_BT: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if kept_BT is None else (kept_BT,)


def sweep_back(
    head: H,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    slopes: Callable[[Scores, jax.Array], tuple[jax.Array, jax.Array]],
    given_BT: jax.Array,
    drawn: Drawn | None = None,
    kept_BT: jax.Array | None = None,
) -> tuple[Scores, H, jax.Array]:
    """Like `sweep`, with the gradients of a function of the scores by the head and by x.

    Args:
      slopes: the function's gradients by `logprob_BT` and `log_z_BT`, from the scores of some targets
        and their part of `given_BT`.
    """

    def one(head: H, x_BTD: jax.Array, targets_BT: jax.Array, given_BT: jax.Array, *kept: jax.Array) -> Any:
        scores, pull = head.score(x_BTD, targets_BT, *_how(drawn, kept))
        dhead, dx_BTD = pull(*slopes(scores, given_BT))
        return dhead, (scores, dx_BTD)

    rows = (x_BTD, targets_BT, given_BT, *_given(kept_BT))
    dhead, (scores, dx_BTD) = over_rows(one, chunk, head, *rows, back=True)
    return scores, jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), dhead, head), dx_BTD


def over_rows(
    one: Callable[..., Any],
    chunk: int,
    head: Any,
    *rows: jax.Array,
    beside: tuple[Any, ...] = (),
    back: bool = False,
) -> Any:
    """`one(head, *beside, *rows)` over chunks of every device's own rows.

    Matrices of the head are sent between devices once, in the type of the features; sums over devices are in
    float32. The compiler decides how `tensor` splits the vocabulary.

    Args:
      one: returns the results of its rows; with `back`, preceded by a head of gradients.
      chunk: tokens per device at a time.
      head: argument of `one`.
      rows: arguments of `one`, [B, T, ...].
      beside: other heads, which get no gradients.
      back: see `one`.

    Returns:
      The results of `one` for all rows, with the gradients summed over the rows.
    """
    heads = (head, *beside)
    heads = jax.tree.map(lambda a: a.astype(rows[0].dtype) if a.ndim > 1 else a, heads)
    mesh = jax.sharding.get_abstract_mesh()
    devices = row_shards(mesh)
    if devices == 1 or rows[0].shape[0] % devices:  # rows that do not divide: the compiler decides the layout
        return _over_chunks(one, chunk, heads, *rows, back=back)
    # Split by the columns of [V, D], like the parameters; if these do not divide, not at all.
    fsdp = mesh.shape["fsdp"]
    split = jax.tree.map(lambda a: a.ndim > 1 and fsdp > 1 and a.shape[1] % fsdp == 0, heads)
    specs = jax.tree.map(lambda split: P(None, "fsdp") if split else P(), split)

    def here(heads: tuple[Any, ...], *rows: jax.Array) -> Any:
        whole = jax.tree.map(lambda a, split: _gathered(a) if split else a, heads, split)
        made = _over_chunks(one, chunk, whole, *rows, back=back)
        return (jax.tree.map(_reduced, made[0], split[0]), made[1]) if back else made

    run = jax.shard_map(
        here,
        in_specs=(specs, *(P(ROW_AXES),) * len(rows)),
        out_specs=(specs[0], P(ROW_AXES)) if back else P(ROW_AXES),
        axis_names=set(ROW_AXES),
        check_vma=False,
    )
    return run(heads, *rows)


def _gathered(a_VD: jax.Array) -> jax.Array:
    """All columns of a matrix whose columns are sharded over `fsdp`."""
    return _by_rows(lambda a_VD: jax.lax.all_gather(a_VD, "fsdp", axis=1, tiled=True), a_VD)


def _reduced(a: jax.Array, split: bool) -> jax.Array:
    """The sum over all devices; for a split matrix, each device's own columns of it."""
    if not split:
        return jax.lax.psum(a, ROW_AXES)

    def scatter(a_VD: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(a_VD, "fsdp", scatter_dimension=1, tiled=True)

    return jax.lax.psum(_by_rows(scatter, a), ("data", "expert"))


def _by_rows(f: Callable[[jax.Array], jax.Array], a_VD: jax.Array) -> jax.Array:
    """`f` on the rows of each device of `tensor`; without this, the compiler gathers them first."""
    parts = jax.sharding.get_abstract_mesh().shape["tensor"]
    spec = P("tensor") if a_VD.shape[0] % parts == 0 else P()
    return jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)(a_VD)


def _over_chunks(
    one: Callable[..., Any], chunk: int, heads: tuple[Any, ...], *rows: jax.Array, back: bool
) -> Any:
    """Like `over_rows`, on one device.

    A chunk has the same number of tokens from every row: the largest divisor of T that fits. If that is less
    than half of what fits, it is all that fits, and the last chunk is padded with zeros. These add nothing:
    their weight and gradient are 0.
    """
    B, T = rows[0].shape[:2]
    most = min(T, max(1, chunk // B))
    divisor = max(t for t in range(1, most + 1) if T % t == 0)
    size = divisor if 2 * divisor > most else most
    if size == T:
        return one(*heads, *rows)
    rows = tuple(jnp.pad(a, ((0, 0), (0, -T % size), *[(0, 0)] * (a.ndim - 2))) for a in rows)

    def body(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        if not back:
            return total, one(*heads, *part)
        dhead, out = one(*heads, *part)
        return jax.tree.map(jnp.add, total, dhead), out

    split = tuple(jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0) for a in rows)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), heads[0]) if back else None
    total, out_NBT = jax.lax.scan(body, zeros, split)
    out = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1, *a.shape[3:])[:, :T], out_NBT)
    return (total, out) if back else out
