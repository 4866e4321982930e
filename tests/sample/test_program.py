"""Generation's program in both forms: layers apart, and scanned with the cache as carry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE, model_of
from tiny_models import FLOAT32, MODELS, SIZE, program_of, sharp_params

from jaxgpt.aot import hlo
from jaxgpt.batch import Batch
from jaxgpt.config import Model, MoE, TransformerXL
from jaxgpt.sample import program
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.program import prepare
from jaxgpt.sample.settings import Sampling
from jaxgpt.sharding import make_mesh
from jaxgpt.target import Target
from jaxgpt.text.chat import render
from jaxgpt.text.tokenizer import ByteTokenizer

GPU = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
XL = TransformerXL(**SIZE, layers=2, width=32, heads=4, mlp_width=64, memory=6, eval_memory=9)
FORMS: dict[str, Model] = MODELS | {
    "relative": replace(MODELS["gpt2"], position="relative"),
    "experts": replace(MODELS["modern"], moe=MoE(experts=4, per_token=2, width=16)),
    "prefix": replace(MODELS["modern"], windows=(), prefix=True),
    "transformer-xl": XL,
    "transformer-xl, biases of its own": replace(XL, shared_biases=False, norm_at="pre"),
}
PROMPTS = [[5, 250, 7], list(range(40, 57))]
DRAWN = Sampling(temperature=1.3, top_k=200, repetition_penalty=1.1)


@pytest.mark.parametrize("name", FORMS)
def test_scanned_layers_make_what_layers_apart_make(name: str) -> None:
    model = FORMS[name]
    params = sharp_params(model)
    apart = Generator(model, FLOAT32, params, ByteTokenizer())
    prog, rows = program_of(apart, PROMPTS, DRAWN, 12, [3, 4], ())
    scanned = replace(prog, target=GPU)
    a = program.generate(prog, apart.params, rows)
    b = program.generate(scanned, prepare(model, prog.compute, GPU, params), rows)
    np.testing.assert_array_equal(a.tokens_BS, b.tokens_BS)
    np.testing.assert_allclose(a.logprobs_BS, b.logprobs_BS, atol=3e-5)
    assert (a.length_B == rows.length_B + 12).all()


PREFIX: Any = FORMS["prefix"]


@jax.jit
def trained_logits(params: dict, batch: Batch) -> jax.Array:
    decoder = model_of(PREFIX)(params)
    return decoder.logits(decoder.hidden(batch).x_BTD)


def trained_logprobs(params: dict, tokens: list[int], weights: list[float]) -> np.ndarray:
    """Log-probability of each token but the first in the forward pass of training on these weights."""
    row = jnp.asarray([tokens])
    ones, places = jnp.ones_like(row[:, 1:]), jnp.arange(len(tokens) - 1)[None]
    batch = Batch(row[:, :-1], row[:, 1:], jnp.asarray([weights[1:]]), ones, places)
    logprobs_TV = np.asarray(jax.nn.log_softmax(trained_logits(params, batch)[0]))
    return logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]]


def test_a_prefix_model_answers_a_dialogue_of_several_turns_as_it_was_trained() -> None:
    """Both ways among what comes before the first answer, and causally from there on."""
    params = sharp_params(PREFIX)
    generator = Generator(PREFIX, FLOAT32, params, ByteTokenizer())
    turns = [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "cdef"), ("user", "gh"))]
    for dialogue in (turns, turns[2:]):
        asked = generator.dialogues([dialogue])
        made = generator.generate(**asked, max_new_tokens=10, stop=())[0]
        start, before = len(asked["prompts"][0]), render(dialogue, generator.tokenizer)
        weights = [*before.weights, 0.0] + [1.0] * 10  # 0 for the token that opens the answer
        expected = trained_logprobs(params, asked["prompts"][0] + made.ids, weights)[start - 1 :]
        np.testing.assert_allclose(made.logprobs, expected, atol=3e-5)
        streamed = [t.logprob for t in generator.stream(**asked, max_new_tokens=10, stop=())]
        np.testing.assert_allclose(streamed, expected, atol=3e-5)
        whole = generator.generate(asked["prompts"], max_new_tokens=10, stop=())[0]
        assert (whole == made) == (dialogue != turns), "an earlier answer must not be seen both ways"


LAYERS, SHARDS = 3, 4
WIDE = replace(FORMS["modern"], vocab_size=272, layers=LAYERS, heads=8, kv_heads=SHARDS)


@pytest.mark.parametrize("target", [HERE, GPU], ids=["apart", "scanned"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_token_costs_two_sums_a_layer_and_three_more_and_brings_only_logits_together(
    rows: int, target: Target
) -> None:
    """No parameter and no part of the cache crosses devices, whatever the number of rows."""
    mesh = make_mesh({"tensor": SHARDS}, jax.devices()[:SHARDS])
    generator = Generator(WIDE, FLOAT32, sharp_params(WIDE), ByteTokenizer(), mesh=mesh)
    prog, call = program_of(generator, [[1, 2, 3]] * rows, DRAWN, 12, [0] * rows, ())
    prog = replace(prog, target=target)
    with jax.set_mesh(mesh):
        params = prepare(WIDE, prog.compute, target, sharp_params(WIDE))
        state, _ = program.prefill(prog, params, call)
        text = program.decode.lower(prog, params, call, state, np.int32(4)).compile().as_text()
    inside = [one for one in hlo.read(text, mesh.shape).collectives if one.depth]
    assert sum(one.runs for one in inside if one.kind == "all-reduce") <= 2 * LAYERS + 3
    sizes = {n for one in inside if one.kind != "all-reduce" for array in one.whole for n in array.dims}
    assert sizes <= {1, *(n // k for n in (rows, WIDE.vocab_size) for k in (1, SHARDS))}
