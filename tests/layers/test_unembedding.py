"""The chunked loss against optax's and log-probabilities, by value and gradient; on a mesh; as compiled.

Shapes: B rows, T tokens per row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from test_adaptive import FORMS, parts
from tiny import MIXED, ONE, assert_close, mesh

from jaxgpt.layers.adaptive import AdaptiveUnembedding
from jaxgpt.layers.unembedding import Head, Unembedding, cross_entropy, target_logprobs
from jaxgpt.sharding import spec

B, T, D, V, CHUNK = 8, 16, 16, 32, 8
OPTIONS = {"plain": (False, None, 0.0), "bias, cap, z-loss": (True, 5.0, 0.1)}
SIZES = {
    "data=8": ONE | {"data": 8},
    "fsdp=8": ONE | {"fsdp": 8},
    "tensor=8": ONE | {"tensor": 8},
    "expert=4,fsdp=2": ONE | {"expert": 4, "fsdp": 2},
    "data=2,fsdp=2,tensor=2": MIXED,
}
options = pytest.mark.parametrize("option", OPTIONS)


@cache
def inputs() -> tuple[jax.Array, ...]:
    """(w_VD, bias_V, x_BTD, targets_BT, weights_BT)"""
    random = np.random.default_rng(0)
    w_VD, bias_V, x_BTD = (jnp.float32(random.standard_normal(s)) for s in ((V, D), (V,), (B, T, D)))
    targets_BT = jnp.int32(random.integers(0, V, (B, T)))
    weights_BT = jnp.float32(random.random((B, T)) * (random.random((B, T)) < 0.6))
    return w_VD, bias_V, x_BTD, targets_BT, weights_BT


def head_of(option: str, w_VD: jax.Array, bias_V: jax.Array) -> Unembedding:
    with_bias, cap, _ = OPTIONS[option]
    return Unembedding(w_VD, bias_V if with_bias else None, cap)


def reference(head: Head, x_BTD, targets_BT, weights_BT, z_loss):
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head.weight) + (0.0 if head.bias is None else head.bias)
    if head.cap is not None:
        logits_BTV = head.cap * jnp.tanh(logits_BTV / head.cap)
    nll_BT = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    hits_BT = jnp.argmax(logits_BTV, -1) == targets_BT
    loss = jnp.sum(weights_BT * (nll_BT + z_loss * log_z_BT**2))
    return loss, (jnp.sum(weights_BT * nll_BT), jnp.sum(weights_BT * hits_BT)), -nll_BT


def summed(option: str, chunk: int, w_VD, bias_V, x_BTD) -> tuple[jax.Array, Any]:
    _, _, _, targets_BT, weights_BT = inputs()
    head, z_loss = head_of(option, w_VD, bias_V), OPTIONS[option][2]
    loss, *rest = cross_entropy(head, x_BTD, targets_BT, weights_BT, z_loss, chunk)
    return loss, tuple(rest)


def preference(logprobs_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Like DPO: a loss on the difference between the documents' log-probabilities, row by row."""
    score_B = jnp.sum(weights_BT * logprobs_BT, axis=1)
    return -jax.nn.log_sigmoid(0.1 * (score_B[::2] - score_B[1::2])).sum()


def preferred(option: str, chunk: int, w_VD, bias_V, x_BTD) -> tuple[jax.Array, Any]:
    _, _, _, targets_BT, weights_BT = inputs()
    logprobs_BT = target_logprobs(head_of(option, w_VD, bias_V), x_BTD, targets_BT, chunk)
    return preference(logprobs_BT, weights_BT), logprobs_BT


LOSSES = {"summed": summed, "preferred": preferred}


@cache
def expected(loss: str, option: str) -> Any:
    """Value, auxiliary outputs and gradients of the plain form in float32."""
    *trained, targets_BT, weights_BT = inputs()

    def plain(w_VD, bias_V, x_BTD):
        head, z_loss = head_of(option, w_VD, bias_V), OPTIONS[option][2]
        value, rest, logprobs_BT = reference(head, x_BTD, targets_BT, weights_BT, z_loss)
        return (value, rest) if loss == "summed" else (preference(logprobs_BT, weights_BT), logprobs_BT)

    return jax.jit(jax.value_and_grad(plain, (0, 1, 2), has_aux=True))(*trained)


def gradient(loss: str, option: str, chunk: int = CHUNK) -> Any:
    return jax.jit(
        jax.value_and_grad(lambda *trained: LOSSES[loss](option, chunk, *trained), (0, 1, 2), has_aux=True)
    )


@options
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [1, 5 * B, B * T, 10**6])  # five positions per row do not divide 16
def test_it_is_the_plain_form(loss: str, option: str, chunk: int) -> None:
    """Values and gradients, including those of a bias (BERT, labels) and of the features."""
    assert_close(gradient(loss, option, chunk)(*inputs()[:3]), expected(loss, option), 1e-6)


@options
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_eight_devices_equal_one(loss: str, option: str, name: str) -> None:
    on = mesh(SIZES[name])
    axes = (("vocab", "embed"), ("vocab",), ("batch", "length", "features"))
    placed = [jax.device_put(a, NamedSharding(on, spec(s))) for a, s in zip(inputs()[:3], axes, strict=True)]
    with jax.set_mesh(on):
        assert_close(gradient(loss, option)(*placed), expected(loss, option), 1e-6)


@pytest.mark.parametrize(("form", "sizes"), [("div=1 tied=False", ONE), ("div=2 tied=True", MIXED)])
def test_the_adaptive_softmax_has_the_same_core(form: str, sizes: dict[str, int]) -> None:
    """Sums and log-probabilities in chunks; also on a mesh that does not divide the clusters."""
    embed, softmax, _ = parts(form)
    head, ids = softmax.over(embed), FORMS[form].vocab_size
    random = np.random.default_rng(0)
    x_BTD = jnp.float32(random.standard_normal((B, T, FORMS[form].width)))
    targets_BT, weights_BT = jnp.int32(random.integers(0, ids, (B, T))), inputs()[-1]

    def plain(head: AdaptiveUnembedding, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs_BT = jnp.take_along_axis(head(x_BTD), targets_BT[..., None], -1)[..., 0]
        return -jnp.sum(weights_BT * logprobs_BT), preference(logprobs_BT, weights_BT)

    def ours(head: AdaptiveUnembedding, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs_BT = head.logprobs(x_BTD, targets_BT, CHUNK)
        losses = head.losses(x_BTD, targets_BT, weights_BT, 0.0, CHUNK)
        return losses.loss, preference(logprobs_BT, weights_BT)

    def both(f: Any) -> Any:
        return jax.jit(lambda *trained: (f(*trained), *jax.vjp(f, *trained)[1]((1.0, 1.0))))(head, x_BTD)

    wanted = both(plain)
    with jax.set_mesh(mesh(sizes)):
        assert_close(both(ours), wanted, 1e-5)


def test_a_length_without_divisors_is_padded_and_not_split_into_single_tokens() -> None:
    """13 tokens per row, 5 at a time: three chunks have the values and gradients of one."""
    w_VD, _, x_BTD, targets_BT, weights_BT = inputs()
    rows = x_BTD[:, :13], targets_BT[:, :13], weights_BT[:, :13]

    def summed(chunk: int, w_VD, x_BTD):
        return cross_entropy(Unembedding(w_VD), x_BTD, *rows[1:], 1e-3, chunk).loss

    def preferred(chunk: int, w_VD, x_BTD):
        return preference(target_logprobs(Unembedding(w_VD), x_BTD, rows[1], chunk), rows[2])

    for loss in (summed, preferred):
        both = [jax.value_and_grad(partial(loss, chunk), (0, 1)) for chunk in (5 * B, 13 * B)]
        assert_close(both[0](w_VD, rows[0]), both[1](w_VD, rows[0]), 1e-6)
        turns = [
            e.params["length"]
            for e in jax.make_jaxpr(both[0])(w_VD, rows[0]).eqns
            if e.primitive.name == "scan"
        ]
        assert set(turns) == {3}


def test_without_gradients_the_loss_is_the_same() -> None:
    option = "bias, cap, z-loss"
    assert_close(summed(option, CHUNK, *inputs()[:3]), expected("summed", option)[0], 1e-6)


def test_the_gradient_follows_a_factor_on_the_loss() -> None:
    w_VD, bias_V, x_BTD, *_ = inputs()

    def of(factor: float) -> jax.Array:
        return jax.grad(lambda x: factor * summed("plain", CHUNK, w_VD, bias_V, x)[0])(x_BTD)

    assert_close(of(3.0), 3 * of(1.0), 1e-6)


def test_without_weight_there_is_no_gradient() -> None:
    w_VD, _, x_BTD, targets_BT, weights_BT = inputs()
    value, grads = jax.value_and_grad(
        lambda w, x: cross_entropy(Unembedding(w, cap=5.0), x, targets_BT, 0 * weights_BT, 0.1, CHUNK)[0],
        (0, 1),
    )(w_VD, x_BTD)
    assert value == 0
    assert all((g == 0).all() for g in grads)


def test_logits_far_from_zero_do_not_overflow() -> None:
    w_VD, bias_V, x_BTD, *_ = inputs()
    (loss, _), grads = gradient("summed", "plain")(w_VD, bias_V, 1e4 * x_BTD)
    assert math.isfinite(loss)
    assert all(np.isfinite(g).all() for g in grads)


def test_rows_that_do_not_divide_the_mesh_have_the_same_loss() -> None:
    w_VD, _, x_BTD, targets_BT, weights_BT = inputs()
    with jax.set_mesh(mesh(ONE | {"fsdp": 8})):
        few = cross_entropy(Unembedding(w_VD), x_BTD[:3], targets_BT[:3], weights_BT[:3], 0.0, CHUNK)
    alone = cross_entropy(Unembedding(w_VD), x_BTD[:3], targets_BT[:3], weights_BT[:3], 0.0, CHUNK)
    assert_close(few, alone, 1e-6)


# ---------------------------------------------------------------------------- the compiled program


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation in an HLO text, by name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%(\S+) .*\{$", line):
            lines = found[start[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def collectives(text: str) -> tuple[list[str], list[str]]:
    """Collectives (kind and shape) outside of loops, and those in a loop's body or its callees."""
    parts, inside = computations(text), set[str]()
    todo = [n for lines in parts.values() for line in lines for n in re.findall(r"body=%([\w.\-]+)", line)]
    while todo:
        inside.add(name := todo.pop())
        called = re.findall(r"(?:calls|to_apply|body)=%([\w.\-]+)", "\n".join(parts[name]))
        todo += [other for other in called if other not in inside]
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"

    def of(names: Any) -> list[str]:
        pattern = rf"= (.*?) ({kinds})(?:-start)?\("
        hits = [re.search(pattern, line) for name in names for line in parts[name]]
        return [f"{hit[2]} {re.sub(r'{[^}]*}', '', hit[1])}" for hit in hits if hit]

    return of(set(parts) - inside), of(inside)


@pytest.mark.parametrize("name", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_projection_is_gathered_once_and_its_gradient_scattered_once(name: str, accumulate: int) -> None:
    """In a step of gradient descent, for any number of chunks; once per microbatch."""
    on, sizes = mesh(SIZES[name]), SIZES[name]
    _, _, x_BTD, targets_BT, weights_BT = inputs()
    rows = NamedSharding(on, spec(("batch",)))

    def step(w_VD: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        def one(w_VD: jax.Array, x_BTD: jax.Array) -> jax.Array:
            return cross_entropy(Unembedding(w_VD), x_BTD, targets_BT, weights_BT, 0.0, 2).loss

        if accumulate == 1:
            return w_VD - 0.1 * jax.grad(one)(w_VD, x_BTD)
        parts = jnp.stack([x_BTD, 2 * x_BTD])
        total, _ = jax.lax.scan(lambda g, x: (g + jax.grad(one)(w_VD, x), None), jnp.zeros_like(w_VD), parts)
        return w_VD - 0.1 * total

    with jax.set_mesh(on):
        w_VD = jax.device_put(inputs()[0], NamedSharding(on, spec(("vocab", "embed"))))
        args = (
            w_VD,
            *(jax.device_put(a, rows) for a in (x_BTD.astype(jnp.bfloat16), targets_BT, weights_BT)),
        )
        lowered = jax.jit(step).lower(*args)
    outside, inside = collectives(lowered.compile().as_text())
    size = f"[{V // sizes['tensor']},{D}]"
    gathers = [c for c in outside + inside if c.startswith("all-gather")]
    assert len(gathers) == 1
    assert size in gathers[0]
    scatters = [c for c in outside + inside if c.startswith("reduce-scatter")]
    assert scatters == [f"reduce-scatter f32[{V // sizes['tensor']},{D // sizes['fsdp']}]"]
    if accumulate == 1:
        assert not [c for c in inside if f"[{V}" in c or size in c]
    # The program before optimization: bfloat16 is sent between devices (a CPU's compiler widens it).
    asked = re.findall(r'"stablehlo.all_gather".*?-> tensor<(\S+)>', lowered.as_text(), re.DOTALL)
    assert len(asked) == 1
    assert asked[0].endswith("bf16")
