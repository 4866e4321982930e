"""Scores against the plain forward pass, whatever the batch, the chunk, the padding and the mesh."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import HERE, place, plain, sharp_params
from tiny_evals import COMPUTE, MODEL, ROWS

from jaxgpt.config import GPT, Bert
from jaxgpt.errors import UserError
from jaxgpt.evals.scoring import Score, Scorer
from jaxgpt.models import abstract_model
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling

REQUESTS = [
    ([5, 250, 7], [*range(100, 117)]),
    ([*range(40, 55)], [3, 1, 4, 1, 5]),
    ([9], [7, 8, 9]),
    ([2], []),
]

NEVER = (-2,)
"""Stop tokens that no model writes."""


@partial(jax.jit, static_argnums=0)
def _logprobs(model: GPT, params: dict, tokens_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    decoder = nnx.merge(abstract_model(model, COMPUTE, HERE)[0], params)
    batch = replace(plain(tokens_BT), weights_BT=weights_BT)
    return jax.nn.log_softmax(decoder.logits(decoder.hidden(batch).x_BTD))


def expected(
    model: GPT, params: dict, given: list[int], scored: list[int], prompt: int | None = None
) -> np.ndarray:
    """Log-probabilities of the continuation's tokens by one row, the first `prompt` tokens its prompt."""
    n, first = len(given) + len(scored), len(given) - 1
    ids, prompt = jnp.asarray([[*given, *scored, *[0] * (20 - n)]]), prompt or len(given)
    places_T = jnp.arange(19)[None]
    weights_BT = ((places_T >= prompt - 1) & (places_T < n - 1)).astype(jnp.float32)
    logprobs_TV = np.asarray(_logprobs(model, params, ids[:, :-1], weights_BT))[0]
    return logprobs_TV[np.arange(first, n - 1), scored]


def assert_same(a: list[Score], b: list[Score]) -> None:
    np.testing.assert_allclose([s.logprob for s in a], [s.logprob for s in b], atol=1e-4)
    assert [s[1:] for s in a] == [s[1:] for s in b]


def test_log_probabilities_are_those_of_the_plain_forward_pass(scorer: Scorer) -> None:
    scores = scorer.token_logprobs(REQUESTS, ROWS)
    for (given, scored), score in zip(REQUESTS[:3], scores, strict=False):
        total = expected(MODEL, scorer.params, given, scored).sum()
        assert score.logprob == pytest.approx(total, abs=1e-4)
        assert (score.tokens, score.bytes) == (len(scored), len(scored))
    assert scores[3] == Score(0.0, True, 0, 0)


def test_batches_and_chunks_change_nothing(scorer: Scorer) -> None:
    whole = scorer.token_logprobs(REQUESTS, ROWS)
    chunked = replace(COMPUTE, loss_chunk=5)  # five places at a time, which do not divide 32
    small = Scorer(MODEL, chunked, scorer.params, scorer.tokenizer, scorer.mesh)
    assert_same(whole, small.token_logprobs(REQUESTS, batch_size=1))


def test_a_mesh_changes_nothing(scorer: Scorer) -> None:
    on, params = place(MODEL, scorer.params, {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1})
    spread = Scorer(MODEL, COMPUTE, params, scorer.tokenizer, on)
    assert_same(scorer.token_logprobs(REQUESTS, ROWS), spread.token_logprobs(REQUESTS, batch_size=3))


def test_greedy_is_what_the_generator_writes(scorer: Scorer) -> None:
    generator = Generator(MODEL, COMPUTE, scorer.params, scorer.tokenizer, mesh=scorer.mesh)
    prompts = [[256, *b"the cat"], [256, *b"on"]]
    made = generator.generate(prompts, Sampling(temperature=0), max_new_tokens=9, stop=NEVER)
    requests = [(prompt, completion.ids) for prompt, completion in zip(prompts, made, strict=True)]
    changed = [(prompt, [*ids[:4], (ids[4] + 1) % 256, *ids[5:]]) for prompt, ids in requests]
    scores = scorer.token_logprobs([*requests, *changed], ROWS)
    assert [score.greedy for score in scores] == [True, True, False, False]
    for completion, score in zip(made, scores, strict=False):
        assert score.logprob == pytest.approx(sum(completion.logprobs), abs=1e-4)


def test_rows_that_pad_the_vocabulary_are_never_the_likeliest(scorer: Scorer) -> None:
    """The embedding has a row that no id of the tokenizer reads: greedy decoding passes it over."""
    head = scorer.params["head"]["weight"].at[263:].set(100 * scorer.params["head"]["weight"][:1])
    params = scorer.params | {"head": {"weight": head}}
    padded = Scorer(MODEL, COMPUTE, params, scorer.tokenizer, scorer.mesh)
    generator = Generator(MODEL, COMPUTE, params, scorer.tokenizer, mesh=scorer.mesh)
    made = generator.generate([[1, 2], [3]], Sampling(temperature=0), max_new_tokens=9, stop=NEVER)[0]
    score = padded.token_logprobs([([1, 2], made.ids)] * ROWS, ROWS)[0]
    assert score.greedy
    assert score.logprob == pytest.approx(sum(made.logprobs), abs=1e-4)
    assert score.logprob < -9, "the row should have taken most of the probability somewhere"


def test_the_context_is_the_prefix_of_a_prefix_model(scorer: Scorer) -> None:
    model = replace(MODEL, prefix=True, layers=2)  # one layer's keys know nothing of each other
    params = sharp_params(model)
    given, scored = [256, *b"what is it"], [*b" that"]
    one = Scorer(model, COMPUTE, params, scorer.tokenizer, scorer.mesh)
    total = one.token_logprobs([(given, scored)])[0].logprob
    assert total == pytest.approx(expected(model, params, given, scored).sum(), abs=1e-4)
    causal = expected(model, params, given, scored, prompt=1).sum()
    assert abs(total - causal) > 1e-2
    # Of a dialogue's later turn: what comes before its first answer alone, and less what is cut off.
    first = one.token_logprobs([(given, scored)], prefix=[4])[0].logprob
    assert first == pytest.approx(expected(model, params, given, scored, prompt=4).sum(), abs=1e-4)
    assert abs(first - total) > 1e-3


def test_a_context_too_long_loses_its_beginning_and_it_is_said(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    before, given, scored = scorer.truncated, [*range(50)], [7, 8]
    long, short = scorer.token_logprobs([(given, scored), *[(given[-31:], scored)] * 3], ROWS)[:2]
    assert long == short
    assert scorer.truncated == before + 1
    assert "1 of 4 contexts lose their beginning, being longer than the model's context of 32" in caplog.text


def test_what_cannot_be_scored_is_refused(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="context of request 1 is empty"):
        scorer.token_logprobs([([1], [2]), ([], [2])])
    with pytest.raises(UserError, match="request 0 has 33 tokens but the model's context is 32"):
        scorer.token_logprobs([([1], [2] * 33)])
    with pytest.raises(UserError, match="batch_size is 0"):
        scorer.token_logprobs([([1], [2])], batch_size=0)
    for model in (Bert(vocab_size=264), GPT(vocab_size=264, causal=False)):
        with pytest.raises(UserError, match="does not predict the next token"):
            Scorer(model, COMPUTE, {}, scorer.tokenizer, scorer.mesh)


def test_a_pair_is_cut_before_the_space(scorer: Scorer) -> None:
    bos = scorer.tokenizer.control["<|bos|>"]
    for pair in (("a b", " c"), ("a b ", "c")):
        assert scorer.pair(*pair) == ([bos, *b"a b"], [*b" c"])
    assert scorer.pair("", "c") == ([bos], [*b"c"])
