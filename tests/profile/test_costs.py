"""Bytes and FLOPs of instructions equal those derived by hand.

Shapes: B rows, D and F features, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.profile.costs import Cost, costs, module_name
from jaxgpt.profile.names import Name

B, D, F, L = 8, 16, 32, 3
SOURCE = 'metadata={op_name="jit(f)/%s"}'


def cost(lines: str, name: str = "it") -> Cost:
    """That of an instruction of a program whose `%p`, `%q`, `%s` are f32[8,16], `%i` an index, `%n` true."""
    entry, *bodies = lines.split("---")
    text = "HloModule jit_f, is_scheduled=true\n\n"
    for number, body in enumerate(bodies):
        text += f"%body.{number} (x: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n\n"
    text += "ENTRY %main (x: f32[8,16]) -> f32[8,16] {\n"
    text += "".join(f"  %{n} = f32[8,16]{{1,0}} parameter({i})\n" for i, n in enumerate("pqs"))
    text += "  %i = s32[] parameter(3)\n  %n = pred[] parameter(4)\n" + entry + "\n}\n"
    assert module_name(text) == "jit_f"
    return costs(text)[name]


ARRAY = 4 * 8 * 16


@pytest.mark.parametrize(
    ("line", "nbytes", "flops"),
    [
        ("f32[8,16]{1,0} add(%p, %q)", 3 * ARRAY, 8 * 16),
        ("f32[8,16]{1,0} multiply(%p, %p)", 2 * ARRAY, 8 * 16),  # one array is read once
        ("bf16[8,16]{1,0} convert(%p)", 1.5 * ARRAY, 0),
        ("pred[8,16]{1,0} compare(%p, %q), direction=LT", 2.25 * ARRAY, 0),
        ("f32[8,16]{0,1} copy(%p)", 2 * ARRAY, 0),
        ("f32[8]{0} reduce(%p, %q), dimensions={1}, to_apply=%r", 2 * ARRAY + 4 * 8, 8 * 16),
        ("f32[2,16]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={2,16}", ARRAY / 2 + 4, 0),
        ("f32[8,16]{1,0} sort(%p), dimensions={1}, to_apply=%r", 2 * ARRAY, None),
        (
            '(f32[8,16]{1,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cudnn$odd"',
            3 * ARRAY,
            None,
        ),
        ("f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%r", 2 * ARRAY, 8 * 16),
        ("(f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p), dimensions={0}", 3 * ARRAY, 0),
        ("f32[16,16]{1,0} all-gather-done(%p)", 0, 0),
        (
            "((f32[8,16]{1,0}), f32[2,16]{1,0}, s32[]) slice-start(%p), slice={[0:2], [0:16]}",
            ARRAY / 2 + 8,
            0,
        ),
        ('f32[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0, 0),
        ('(s32[]) while(%p), body=%b, backend_config={"known_trip_count":{"n":"4"}}', 0, 0),
    ],
)
def test_one_instruction(line: str, nbytes: float, flops: float | None) -> None:
    found = cost(f"  %it = {line}, {SOURCE % 'norm/mul'}")
    assert (found.bytes, found.flops) == (nbytes, flops)
    assert found.name.scope == "norm"


def test_what_a_fusion_reads_and_writes() -> None:
    """It slices one operand, updates another in place, and squares a third."""
    entry = "  %it = f32[8,16]{1,0} fusion(%p, %q, %s, %i), kind=kLoop, calls=%body.0"
    body = f"""
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[8,16]{{1,0}} parameter(1)
  %c = f32[8,16]{{1,0}} parameter(2)
  %d = s32[] parameter(3)
  %v = f32[8,16]{{1,0}} bitcast(%a)
  %w = f32[2,16]{{1,0}} dynamic-slice(%v, %d, %d), dynamic_slice_sizes={{2,16}}
  %e = f32[8,16]{{1,0}} multiply(%c, %c), {SOURCE % "attention/mul"}
  %f = f32[2,16]{{1,0}} slice(%e), slice={{[0:2], [0:16]}}
  %g = f32[2,16]{{1,0}} add(%w, %f), {SOURCE % "attention/add"}
  ROOT %h = f32[8,16]{{1,0}} dynamic-update-slice(%b, %g, %d, %d)"""
    found = cost(f"{entry}\n---{body}")
    slice_, scalar = ARRAY / 4, 4
    assert found.bytes == slice_ + ARRAY + scalar + slice_
    assert found.flops == 8 * 16 + 2 * 16
    assert found.name == Name("attention", "", "add")  # the last part that says where it comes from


def test_of_two_arrays_that_one_number_chooses_between_one_is_read() -> None:
    entry = "  %it = f32[8,16]{1,0} fusion(%p, %q, %n), kind=kLoop, calls=%body.0"
    body = """
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %c = pred[] parameter(2)
  %d = pred[8,16]{1,0} broadcast(%c), dimensions={}
  %e = f32[8,16]{1,0} negate(%a)
  ROOT %h = f32[8,16]{1,0} select(%d, %e, %b)"""
    assert cost(f"{entry}\n---{body}").bytes == 2 * ARRAY + 1
    both = body.replace("negate(%a)", "add(%a, %b)")  # now one is read on both sides
    assert cost(f"{entry}\n---{both}").bytes == 3 * ARRAY + 1


def test_a_copy_is_named_by_what_it_copies() -> None:
    lines = f"  %x = f32[8,16]{{1,0}} add(%p, %q), {SOURCE % 'mlp/add'}\n  %it = f32[8,16]{{0,1}} copy(%x)"
    assert cost(lines).name == Name("mlp", "", "copy")
    assert cost("  %it = f32[8,16]{0,1} copy(%p)").name == Name("", "", "copy")


def test_a_product_equals_its_analytic_numbers() -> None:
    """In a scan, over slices of a stack of weights; at the end a softmax."""

    def program(x_BD: jax.Array, w_LDD: jax.Array, w_DF: jax.Array) -> jax.Array:
        x_BD, _ = jax.lax.scan(lambda x_BD, w_DD: (x_BD @ w_DD, None), x_BD, w_LDD)
        with jax.named_scope("out"):
            return jax.nn.softmax(x_BD @ w_DF)

    arrays = jnp.ones((B, D)), jnp.ones((L, D, D)), jnp.ones((D, F))
    compiled = jax.jit(program).lower(*arrays).compile()
    found = [one for one in costs(compiled.as_text()).values() if one.name.product]
    sizes = {one.name.product: (one.bytes, one.flops) for one in found}
    assert sizes[f"{B}x{D} · {D}x{D}"] == (4 * (2 * B * D + D * D), 2 * B * D * D)
    out = next(one for one in found if one.name.product == f"{B}x{D} · {D}x{F}")
    assert out.name.scope == "out"
    assert out.bytes == 4 * (B * D + D * F + B * F)
    assert out.flops >= 2 * B * D * F  # what is fused with it counts too
