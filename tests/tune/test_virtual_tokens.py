"""Virtual tokens: what a prompt is, and that caching and packing do not change what a token sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLOAT32, GPT2, HERE, MIXED, V, mesh, packed, plain, sharp_params
from tiny_tune import LATEST, SMALL, graph, tuned

from jaxgpt.config import GPT, PrefixTuning, PromptTuning
from jaxgpt.layers.added import Added
from jaxgpt.layers.cache import init_cache
from jaxgpt.models import assemble, decoding_params
from jaxgpt.tune import make_tuning

P = 5
TOKENS = jnp.asarray(np.random.default_rng(2).integers(1, V, (3, 12)))


def with_prompt(model: GPT) -> dict:
    prompt = 0.3 * jax.random.normal(jax.random.key(5), (P, model.width))
    return sharp_params(model) | {"added": Added(prompt_PD=prompt)}


@pytest.mark.parametrize("model", [SMALL, replace(LATEST, windows=())], ids=["gpt2", "modern"])
def test_a_prompt_is_what_its_embeddings_as_tokens_would_be(model: GPT) -> None:
    """A model whose table holds the prompt as ids, given these ids first, computes the same."""
    params = with_prompt(model)
    longer = replace(model, vocab_size=V + P)
    own = {k: v for k, v in params.items() if k != "added"}
    table = jnp.concatenate([own["embed"]["weight"], params["added"].prompt_PD])
    own = own | {"embed": {"weight": table}}
    ids = jnp.concatenate([jnp.broadcast_to(jnp.arange(V, V + P), (3, P)), TOKENS], axis=1)
    expected = jax.jit(lambda own: assemble(graph(longer), own).hidden(plain(ids)).x_BTD)(own)[:, P:]
    got = jax.jit(lambda params: assemble(graph(model), params).hidden(plain(TOKENS)).x_BTD)(params)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    "model", [SMALL, LATEST, replace(SMALL, position="alibi")], ids=["gpt2", "modern", "alibi"]
)
@pytest.mark.parametrize("form", ["prompt", "prefix"])
def test_cached_equals_uncached(model: GPT, form: str) -> None:
    """In the layers' form of a CPU and of an accelerator, with windows and rotary embedding."""
    params = with_prompt(model)
    if form == "prefix":
        shape = (model.layers, P, model.groups, model.head)
        keys = jax.random.split(jax.random.key(3))
        params["added"] = Added(prefix=tuple(jax.random.normal(key, shape) for key in keys))
    whole = jax.jit(lambda params: assemble(graph(model), params).hidden(plain(TOKENS)).x_BTD)(params)
    for scanned in (True, False):
        target = replace(HERE, unroll=not scanned)
        held = params if scanned else decoding_params(model, params)

        @jax.jit
        def decode(params: dict, scanned: bool = scanned, target: Any = target) -> jax.Array:
            module = assemble(graph(model, scanned), params)
            cache = init_cache(model, target, 3, 16, jnp.dtype("float32"))
            first, cache = module.decode(TOKENS[:, :7], None, cache)
            parts, start = [first], jnp.full(3, 7)
            for i in range(7, 10):
                x, cache = module.decode(TOKENS[:, i : i + 1], start, cache)
                parts, start = [*parts, x], start + 1
            return jnp.concatenate(parts, axis=1)

        np.testing.assert_allclose(decode(held), whole[:, :10], atol=3e-5)


@pytest.mark.parametrize("model", [SMALL, LATEST], ids=["gpt2", "modern"])
def test_packed_equals_unpacked(model: GPT) -> None:
    params = with_prompt(model)
    run = jax.jit(lambda params, batch: assemble(graph(model), params).hidden(batch).x_BTD)
    batch = packed([(7, 9), (4, 12)])
    whole = run(params, batch)
    for row, sizes in enumerate([(7, 9), (4, 12)]):
        start = 0
        for size in sizes:
            alone = run(params, plain(batch.tokens_BT[row : row + 1, start : start + size]))
            np.testing.assert_allclose(whole[row, start : start + size], alone[0], atol=2e-5)
            start += size


def test_a_prefix_is_outside_every_window_and_shifts_positions() -> None:
    """A token far beyond the window sees it; learned positions of documents begin after it."""
    model = replace(GPT2, context=24, windows=(2,))
    params = with_prompt(model)
    run = jax.jit(lambda params: assemble(graph(model), params).hidden(plain(TOKENS)).x_BTD)
    moved = params | {"added": Added(prompt_PD=-params["added"].prompt_PD)}
    assert (np.abs(run(params) - run(moved)).max(-1) > 1e-3).all()
    table = params["position"]["weight"]
    unread = params | {"position": {"weight": table.at[P + 12 :].set(9.0)}}
    np.testing.assert_array_equal(run(unread), run(params))
    read = params | {"position": {"weight": table.at[P + 11].set(9.0)}}
    assert np.abs(run(read) - run(params))[:, -1].max() > 1e-3


def test_a_prompt_begins_with_a_text_or_with_tokens_of_the_vocabulary() -> None:
    params, ids = sharp_params(SMALL), (3, 9, 4)
    tune = PromptTuning(tokens=P, init="text", text="x")
    prompt = make_tuning(tune, SMALL, FLOAT32, HERE, text=ids).init(jax.random.key(0), params)["added"][
        "prompt"
    ]
    table = params["embed"]["weight"]
    np.testing.assert_array_equal(prompt, table[jnp.asarray([3, 9, 4, 3, 9])])
    drawn = tuned(PromptTuning(tokens=P)).state.params["added"]["prompt"]
    assert all((row == table).all(-1).any() for row in drawn)


def test_a_prefix_begins_as_the_keys_of_real_tokens_on_any_mesh() -> None:
    """Equal to the prompt of the same tokens."""
    one, eight = (tuned(PrefixTuning(tokens=P), LATEST, *sizes) for sizes in ((), (MIXED,)))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(c.state.params)) for c in (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    prompt = tuned(PromptTuning(tokens=P), LATEST)
    with jax.set_mesh(mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1})):
        settled = jax.jit(lambda learned: prompt.model(learned).settled().prefix)(prompt.state.params)
    assert settled[0].shape == one.state.params["added"]["keys"].shape
