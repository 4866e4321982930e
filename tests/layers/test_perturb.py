"""The seam at the embeddings: other embeddings are other tokens, and without a change nothing changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GPT2, MODERN, T, V, model_of, plain, sharp_params

from jaxgpt.config import Bert, TransformerXL
from jaxgpt.layers.perturb import Change, perturbing

SIZES = {"vocab_size": V, "context": T, "layers": 1, "width": 32, "heads": 4}
MODELS = {
    "gpt2": GPT2,
    "modern": MODERN,
    "bert": Bert(**SIZES),
    "adaptive": TransformerXL(**SIZES, cutoffs=(8, 24), div=2),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_another_tokens_embedding_is_another_token(model) -> None:
    tokens = np.random.default_rng(0).integers(1, V, (2, 2, T)).astype(np.int32)
    build, params = model_of(model), sharp_params(model)

    def hidden(tokens_BT: jax.Array, change: Change) -> jax.Array:
        with perturbing(change):
            return build(params).hidden(plain(tokens_BT)).x_BTD

    @jax.jit
    def both(one_BT: jax.Array, other_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen: list[jax.Array] = []
        wanted = hidden(other_BT, lambda x_BTD: seen.append(x_BTD) or x_BTD)
        assert [x.shape for x in seen] == [(2, T, model.width)]  # once: neither positions nor clusters
        return wanted, hidden(one_BT, lambda x_BTD: seen[0])

    wanted, made = both(*map(jnp.asarray, tokens))
    np.testing.assert_array_equal(wanted, made)
