"""Rows of a table: what belongs together, and what a real trace of a small program says."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.profile.names import Name
from jaxgpt.profile.profiler import start_trace
from jaxgpt.profile.table import Instruction, Steps, traced_steps
from jaxgpt.report.profiled import scaled

B, D, L, STEPS = 64, 128, 3, 2


def instruction(number: int, name: Name, seconds: float, flops: float | None = 1.0) -> Instruction:
    return Instruction(f"fusion.{number}", name, seconds, 2.0, 8.0, flops)


def test_rows_are_scopes_and_passes_and_products() -> None:
    """Twelve layers are one row, and an unknown number makes an unknown sum."""
    softmax, other = Name("layers/softmax", "forward", "exp"), Name("layers/softmax", "backward", "mul")
    product = Name("layers/mlp", "forward", "dot_general", "8x4 · 4x16")
    found = Steps(
        20.0,
        [
            *(instruction(i, softmax, 1.0 / 12) for i in range(12)),
            instruction(12, softmax._replace(what="div"), 3.0),
            instruction(13, other, 2.0, None),
            instruction(14, other, 1.0),
            instruction(15, product, 5.0),
            instruction(16, product._replace(product="8x16 · 16x4"), 1.5),
            instruction(17, product._replace(product="", what="tanh"), 0.5),
        ],
        {},
        1,
    )
    rows = [(row["scope"], row["pass"], row["what"], row["runs"]) for row in found.operations]
    assert rows == [
        ("layers/mlp", "forward", "8x4 · 4x16", 2),
        ("layers/softmax", "forward", "div, exp", 26),
        ("layers/softmax", "backward", "mul", 4),
        ("layers/mlp", "forward", "8x16 · 16x4", 2),
        ("layers/mlp", "forward", "tanh", 2),
    ]
    forward, backward = found.operations[1:3]
    assert (forward["share"], forward["flops"], forward["bytes"]) == (pytest.approx(0.2), 13, 104)
    assert (backward["flops"], backward["bytes"]) == (None, 16)
    assert found.idle == pytest.approx(6)


def test_a_traced_product_has_its_analytic_numbers(tmp_path: Path) -> None:
    """Runs of a loop's body are counted in the trace."""

    def program(x_BD: jax.Array, w_LDD: jax.Array) -> jax.Array:
        with jax.named_scope("layers"):
            return jax.lax.scan(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None), x_BD, w_LDD)[0]

    arrays = jnp.ones((B, D)), jnp.ones((L, D, D))
    compiled = jax.jit(program).lower(*arrays).compile()
    compiled(*arrays).block_until_ready()
    start_trace(tmp_path)
    start = time.perf_counter()
    for _ in range(STEPS):
        compiled(*arrays).block_until_ready()
    seconds = time.perf_counter() - start
    jax.profiler.stop_trace()
    found = traced_steps(tmp_path, compiled.as_text(), seconds, STEPS)
    assert found.devices == 1
    assert found.seconds == seconds / STEPS
    product = next(row for row in found.operations if row["product"])
    assert (product["scope"], product["what"], product["runs"]) == ("layers", f"{B}x{D} · {D}x{D}", L)
    assert product["flops"] == pytest.approx(L * 2 * B * D * D, rel=0.02)  # what is fused with it counts too
    assert product["bytes"] == L * 4 * (2 * B * D + D * D)
    assert all(row["seconds"] >= 0 for row in found.operations)
    assert 0 < sum(row["share"] for row in found.operations) <= 1 + 1e-6
    assert found.idle + sum(one.seconds for one in found.instructions) == pytest.approx(found.seconds)


def test_a_program_without_a_text_or_a_trace(tmp_path: Path) -> None:
    assert traced_steps(tmp_path, "", 1.0, 2) == Steps(0.5, [], {}, 0)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 "), (999.6, "1 k"), (12.34e9, "12.3 G"), (0.5, "500 m"), (2e-6, "2 µ"), (3e18, "3e+03 P")],
)
def test_numbers_for_people(value: float, said: str) -> None:
    assert scaled(value) == said
