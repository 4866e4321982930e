"""What a run costs, by hand.

Shapes: V vocabulary, T length, D width, F hidden width of the MLP, K head width, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import FLOAT32, GPT2, MODELS, MODERN, T, V, make_run, model_of, plain, sharp_params

from jaxgpt.config import GPT, Compute, Mesh, Optim, Train
from jaxgpt.errors import UserError
from jaxgpt.plan import Cost, cost, human

D, L = 32, 2
TABLES = (V + T) * D
LAYER_MATRICES = 4 * D * D + 2 * D * 128  # attention; MLP
LAYER_VECTORS = 4 * D + 4 * D + (128 + D)  # two norms; biases of attention; of the MLP
PARAMETERS = TABLES + L * (LAYER_MATRICES + LAYER_VECTORS) + 2 * D
FLOAT, COUNTER = 4, 4  # bytes


def test_gpt2s_form_by_hand() -> None:
    found = cost(make_run(GPT2, train=Train(steps=100, batch_size=8, accumulate=2)))
    assert found.parameters == PARAMETERS
    assert found.non_embedding == PARAMETERS - TABLES
    assert found.parameter_bytes == found.gradient_bytes == FLOAT * PARAMETERS
    assert found.optimizer_bytes == 2 * FLOAT * PARAMETERS + 2 * COUNTER  # moments; Adam's and the schedule's
    assert found.tokens_per_step == 8 * T  # over all microbatches
    # Six a parameter that is multiplied, the tied table once; scores and their sums over T keys.
    assert found.flops_per_token == 6 * (PARAMETERS - TABLES + V * D) + 12 * L * D * T
    assert (found.devices, found.split) == (1, 1)
    assert found.device_bytes == 4 * FLOAT * PARAMETERS + 2 * COUNTER + found.activation_bytes


def test_todays_form_by_hand() -> None:
    found = cost(make_run(MODERN))
    F, K = 128, 4  # 8/3 x 32 up to a multiple of 64; 32 / 8 heads
    attention = D * (8 + 2 * 4) * K + 8 * K * D  # 8 query heads, 4 key-value heads
    layer = attention + 3 * D * F + 2 * D + 2 * K  # two norms, and two of queries and keys
    assert found.parameters == 2 * V * D + L * layer + D
    assert found.non_embedding == V * D + L * layer + D  # the output projection is a product
    # The first layer sees 4 tokens back, the second all.
    assert found.flops_per_token == 6 * found.non_embedding + 12 * D * (4 + T)


def test_muon_keeps_one_moment_of_the_layers_matrices() -> None:
    run = make_run(GPT2)
    adamw, muon = (cost(replace(run, optim=Optim(name=name))) for name in ("adamw", "muon"))
    saved = adamw.optimizer_bytes - muon.optimizer_bytes
    assert saved == pytest.approx(FLOAT * L * LAYER_MATRICES, abs=20 * COUNTER)
    assert muon.parameter_bytes == adamw.parameter_bytes


def multiplied(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a jaxpr: two for each number of either factor and of the result."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (inner, _), _ = equation.params["dimension_numbers"]
            size = 2 * equation.outvars[0].aval.size
            for axis in inner:
                size *= equation.invars[0].aval.shape[axis]
            total += size
        for value in equation.params.values():
            part = getattr(value, "jaxpr", value)
            total += times * multiplied(part) if hasattr(part, "eqns") else 0
    return total


@pytest.mark.parametrize("form", MODELS)
def test_flops_are_those_of_the_products_the_model_makes(form: str) -> None:
    """Counted in the forward pass; the backward pass makes two products for each of its own."""
    model = replace(MODELS[form], windows=())  # which are masked here, and not computed on a GPU
    tokens = jnp.zeros((3, T), jnp.int32)

    def logits(params: dict) -> jax.Array:
        decoder = model_of(model)(params)
        return decoder.logits(decoder.hidden(plain(tokens)).x_BTD)

    forward = multiplied(jax.make_jaxpr(logits)(sharp_params(model)).jaxpr)
    vectors = sum(
        p.size for path, p in jax.tree.leaves_with_path(sharp_params(model)) if path[-1].key != "weight"
    )
    assert cost(make_run(model)).flops_per_token == 3 * forward / tokens.size + 6 * vectors


# ------------------------------------------------------------------------------------ activations


@cache
def activations(model: GPT = GPT2, rows: int = 8, **compute: Any) -> int:
    run = make_run(model, compute=replace(FLOAT32, **compute), train=Train(batch_size=rows))
    return cost(run).activation_bytes


@pytest.mark.parametrize("form", MODELS)
def test_remat_keeps_less_but_never_less_than_the_stream(form: str) -> None:
    none, dots, full = (activations(MODELS[form], remat=remat) for remat in ("none", "dots", "full"))
    stream = L * 8 * T * D * FLOAT
    assert stream < full < dots < none
    # Beyond the stream, policies differ by layer: what is kept of more layers grows as it should.
    deep = replace(MODELS[form], layers=3 * L)
    assert activations(deep, remat="full") - full == pytest.approx(2 * stream, rel=0.02)
    assert activations(deep, remat="none") - none > 2 * (dots - full)


def test_dots_keep_the_products_that_are_needed_again() -> None:
    """Queries, keys, values, attention's output, the MLP's inner product; its outer one is only added."""
    kept = activations(remat="dots") - activations(remat="full")
    assert kept == L * 8 * T * (4 * D + 128) * FLOAT


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("form", MODELS)
def test_activations_grow_with_the_rows_alone(form: str, remat: str) -> None:
    """What is left for no rows would be copies of parameters.

    Eight rows are 128 tokens, the MLP's hidden width: what is kept of them has the shape of a parameter.
    """
    one, two = (activations(MODELS[form], rows, remat=remat) for rows in (8, 16))
    assert abs(2 * one - two) < 0.02 * FLOAT * PARAMETERS


def test_half_precision_keeps_less() -> None:
    assert activations(dtype="bfloat16") < activations()


# ---------------------------------------------------------------------------------------- meshes


def test_a_mesh_shares_the_state_over_fsdp_and_tensor_and_the_rows_over_data_and_fsdp() -> None:
    run = make_run(GPT2, train=Train(batch_size=32, accumulate=2))
    one, many = cost(run), cost(replace(run, mesh=Mesh(data=2, fsdp=4, tensor=2)))
    assert (many.devices, many.split) == (16, 8)
    for name in ("parameters", "parameter_bytes", "optimizer_bytes", "flops_per_token", "tokens_per_step"):
        assert getattr(many, name) == getattr(one, name)
    assert one.activation_bytes == activations(rows=16)
    assert many.activation_bytes == activations(rows=2)
    held = many.parameter_bytes + many.gradient_bytes + many.optimizer_bytes
    assert many.device_bytes == held / 8 + many.activation_bytes


def test_what_does_not_divide_is_refused() -> None:
    run = make_run(GPT2, train=Train(batch_size=8))
    assert isinstance(cost(replace(run, mesh=Mesh(data=8))), Cost)
    with pytest.raises(UserError, match="not divisible by data x fsdp x expert = 16 devices"):
        cost(replace(run, mesh=Mesh(data=16)))
    with pytest.raises(UserError, match=r"model\.heads 4 is not divisible by mesh\.tensor 8"):
        cost(replace(run, mesh=Mesh(tensor=8)))


def test_the_attention_kernel_changes_no_cost() -> None:
    """It is counted as XLA's: what flash attention keeps depends on a GPU that may not be here."""
    run = make_run(GPT2)
    assert cost(run) == cost(replace(run, compute=Compute(dtype="float32", attention="auto")))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (80 * 2**30, "80 GiB"),
        (2**51, "2048 TiB"),
    ],
)
def test_bytes_are_written_in_a_unit_that_suits(size: int, words: str) -> None:
    assert human(size) == words
