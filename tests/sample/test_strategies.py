"""The choice of a token, against naive references in numpy."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt.config import from_json, to_json
from jaxgpt.errors import UserError
from jaxgpt.sample.settings import Sampling
from jaxgpt.sample.strategies import (
    Features,
    choose,
    controls_of,
    features_of,
    noise,
    penalize,
    repeats,
    truncate,
)

V = 12
ALL_ON = Features(random=True, top_k=True, top_p=True, penalty=True, typical=True)
OFF = Features(random=True, top_k=True, top_p=True, penalty=True)
truncate_jit = jax.jit(truncate, static_argnums=2)


def kept_by_reference(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, float]:
    """Which tokens may be drawn, and how near top-p came to a tie with rounding."""
    x = logits.astype(np.float64) / s.temperature
    kept = np.ones(len(x), bool)
    if s.top_k:
        kept &= x >= np.sort(x)[::-1][min(s.top_k, len(x)) - 1]
    near = 1.0
    if s.top_p < 1:
        p = np.where(kept, np.exp(x - x.max()), 0)
        p /= p.sum()
        masses = {value: p[x >= value].sum() for value in set(x[kept])}
        near = min(abs(mass - s.top_p) for mass in masses.values())
        kept &= x >= max(value for value, mass in masses.items() if mass >= s.top_p - 1e-12)
    share = np.exp(x - x.max())
    if s.min_p > 0:
        near = min(near, float(np.min(np.abs(share - s.min_p))))
    kept &= share >= s.min_p
    if s.typical_p < 1:  # Meister et al. 2022, equation 8
        p = np.where(kept, share, 0) / share[kept].sum()
        surprisal = -np.log(p, where=kept, out=np.full(len(p), np.inf))
        far = np.abs(surprisal - (p[kept] * surprisal[kept]).sum())
        masses = {value: p[far <= value].sum() for value in set(far[kept])}
        gaps = np.diff(np.sort(far[kept]))
        near = min([near, *(abs(mass - s.typical_p) for mass in masses.values()), *gaps[gaps > 1e-9]])
        kept &= far <= min(value for value, mass in masses.items() if mass >= s.typical_p - 1e-12) + 1e-9
    return kept, near


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=V, max_size=V),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, V + 3),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.01, 1),
)
def test_exactly_the_right_tokens_survive_with_ties_kept_whole(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    """The others leave few tokens to choose from, so that typical-p is tried beside top-k alone."""
    others = {"top_p": top_p, "min_p": min_p} if typical_p > 0.8 else {"typical_p": typical_p}
    s = Sampling(temperature=temperature, top_k=top_k, **others)
    expected, near = kept_by_reference(np.asarray(logits), s)
    assume(near > 1e-4)  # there, float32 may honestly differ from float64
    x_BV = jnp.asarray([logits], jnp.float32)
    controls = controls_of([s], [0])._replace(typical_B=np.float32([s.typical_p]))
    kept_BV = np.isfinite(truncate_jit(x_BV, controls, ALL_ON))
    np.testing.assert_array_equal(kept_BV[0], expected)


@pytest.mark.parametrize("s", [Sampling(), Sampling(top_k=100), Sampling(min_p=0.0, top_p=1.0)])
def test_settings_that_are_off_drop_nothing(s: Sampling) -> None:
    x_BV = jnp.asarray([[-100.0, 0, 80, -3]])
    assert np.isfinite(truncate(x_BV, controls_of([s], [0]), OFF)).all()


def test_signed_zeros_tie() -> None:
    x_BV = jnp.asarray([[-0.0, 0.0, -1.0]])
    kept_BV = truncate(x_BV, controls_of([Sampling(top_k=1)], [0]), OFF)
    assert np.isfinite(kept_BV)[0].tolist() == [True, True, False]


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    x_BV = jnp.asarray([[3.0, -2.0, 4.0, -1.0]])
    seen_BV = jnp.asarray([[True, True, False, False]])
    got = penalize(x_BV, seen_BV, jnp.asarray([2.0]))
    np.testing.assert_allclose(got, [[1.5, -4.0, 4.0, -1.0]])


def draw(logits: list[float], s: Sampling, count: int, position: int = 7) -> np.ndarray:
    """Tokens of `count` rows with the same logits and their own seeds."""
    x_BV = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    places_B = jnp.full(count, position)
    draws = jax.jit(choose, static_argnums=4)
    controls = controls_of([s] * count, range(count))
    return np.asarray(draws(x_BV, None, places_B, controls, features_of([s]))[0])


@pytest.mark.parametrize("s", [Sampling(), Sampling(temperature=2.0), Sampling(top_k=4)])
def test_frequencies_follow_the_distribution(s: Sampling) -> None:
    logits, count = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0], 20_000
    x = np.asarray(logits) / s.temperature
    x[~kept_by_reference(np.asarray(logits), s)[0]] = -np.inf
    p = np.exp(x) / np.exp(x).sum()
    found = np.bincount(draw(logits, s, count), minlength=len(p))
    assert (found[p == 0] == 0).all()
    expected = count * p[p > 0]
    chi2 = ((found[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 20.5  # the 99.9th percentile with five degrees of freedom


def test_neighbouring_positions_draw_independently() -> None:
    a, b = (draw([0.0, 0.0], Sampling(), 4000, position=i) for i in (3, 4))
    assert abs(np.mean(a == b) - 0.5) < 0.03


def test_noise_is_a_function_of_seed_and_position_alone() -> None:
    together = noise(jnp.asarray([5, 6, 5], jnp.uint32), jnp.asarray([1, 1, 2]), 9)
    alone = noise(jnp.asarray([5], jnp.uint32), jnp.asarray([2]), 9)
    np.testing.assert_array_equal(together[2], alone[0])
    assert len({tuple(row) for row in np.asarray(together).tolist()}) == 3


def test_rows_of_one_batch_keep_their_own_settings() -> None:
    key = jax.random.key(3)
    x_BV = jax.random.normal(key, (5, V)) * 2
    seen_BV = jax.random.bernoulli(key, 0.3, (5, V))
    rows = [
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(top_p=0.5, repetition_penalty=1.5),
        Sampling(min_p=0.2, presence_penalty=1.5, frequency_penalty=0.5),
        Sampling(temperature=0.9, logit_bias={3: -100, 5: 1.5}),
    ]
    counts_BV = jnp.floor(jax.random.uniform(key, (5, V)) * 3)
    place_B, counts = jnp.arange(5), {"counts_BV": counts_BV}
    together = choose(x_BV, seen_BV, place_B, controls_of(rows, range(5)), features_of(rows), **counts)
    for i, row in enumerate(rows):
        part = slice(i, i + 1)
        controls = controls_of([row], [i])
        counts = {"counts_BV": counts_BV[part]}
        alone = choose(x_BV[part], seen_BV[part], place_B[part], controls, features_of([row]), **counts)
        assert int(together[0][i]) == int(alone[0][0])
        np.testing.assert_allclose(together[1][i], alone[1][0], rtol=1e-6)


def test_greedy_takes_the_lowest_id_of_a_tie_and_computes_nothing_else() -> None:
    s = Sampling(temperature=0, top_k=5, top_p=0.3)
    assert features_of([s]) == Features(False, False, False, False)
    assert draw([1.0, 3.0, 3.0], s, 1)[0] == 1


def test_log_probability_is_the_models_own_whatever_the_settings() -> None:
    x_BV = jnp.asarray([[1.0, 2.0, -1.0, 0.5]])
    s = Sampling(temperature=0.3, top_k=2, min_p=0.1, repetition_penalty=2.0)
    seen_BV = jnp.asarray([[False, True, False, False]])
    ids_B, logprobs_B, *_ = choose(x_BV, seen_BV, jnp.asarray([0]), controls_of([s], [0]), features_of([s]))
    expected = jax.nn.log_softmax(x_BV)[0, ids_B[0]]
    np.testing.assert_allclose(logprobs_B[0], expected, rtol=1e-6)


def test_ids_outside_the_tokenizer_are_never_chosen() -> None:
    x_BV = jnp.tile(jnp.asarray([[0.0, 0.0, 50.0, 90.0]]), (64, 1))
    for s in (Sampling(temperature=0), Sampling(temperature=5.0, top_k=3)):
        controls = controls_of([s] * 64, range(64))
        ids_B = choose(x_BV, None, jnp.zeros(64, int), controls, features_of([s]), vocab=2).ids_B
        assert int(ids_B.max()) < 2


repeats_jit = jax.jit(repeats, static_argnums=(3, 4))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=10), st.integers(0, 4)),
        min_size=2,
        max_size=2,
    )
)
def test_the_tokens_that_would_repeat_an_ngram_are_those_of_the_definition(
    rows: list[tuple[list[int], int]],
) -> None:
    """Beyond a row's length stands what would match."""
    tokens = np.asarray([ids + [1] * (10 - len(ids)) for ids, _ in rows])
    lengths, ngrams = (np.asarray(x) for x in ([len(ids) for ids, _ in rows], [n for _, n in rows]))
    found = np.asarray(repeats_jit(tokens, lengths, ngrams, 4, 3))
    for (ids, n), banned in zip(rows, found, strict=True):
        seen = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)} if n else set()
        expected = [n > 0 and len(ids) >= n - 1 and (*ids[len(ids) - n + 1 :], v) in seen for v in range(3)]
        assert banned.tolist() == expected


def test_a_row_where_nothing_may_come_says_so() -> None:
    x_BV, s = jnp.asarray([[1.0, 2.0], [1.0, 2.0]]), Sampling(temperature=0)
    allowed_BV = jnp.asarray([[True, False], [False, False]])
    how = (controls_of([s] * 2, [0, 0]), features_of([s]), 2, allowed_BV)
    chosen = choose(x_BV, None, jnp.zeros(2, int), *how)
    assert (int(chosen.ids_B[0]), np.asarray(chosen.stuck_B).tolist()) == (0, [False, True])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((5, 1.0), r"logit_bias is \(5, 1\.0\); give token ids"),
        (((5, 1.0), (5, 2.0)), "each once"),
        ({-1: 1.0}, "the id -1; ids are 0 or more"),
        ({3: 101}, "logit_bias of 3 is 101.0; it must be between -100 and 100"),
        ({3: float("nan")}, "logit_bias of 3 is nan"),
        ({"a": 1}, "give token ids"),
        (7, "logit_bias is 7"),
    ],
)
def test_a_bad_bias_is_named(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(logit_bias=given)


def test_a_bias_is_the_same_in_any_form() -> None:
    assert Sampling(logit_bias={9: -1, 2: 3}).logit_bias == ((2, 3.0), (9, -1.0))
    tree = to_json(Sampling(logit_bias=((2, 3.0),)))
    assert from_json(Sampling, json.loads(json.dumps(tree))) == Sampling(logit_bias=((2, 3.0),))
    with pytest.raises(UserError, match=r"logit_bias\[0\] is \[2\]; it must have 2 entries"):
        from_json(Sampling, tree | {"logit_bias": [[2]]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", -2.5),
        ("frequency_penalty", 2.1),
        ("typical_p", 0.0),
        ("no_repeat_ngram", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name} is {value}; it must be .*\.$"):
        Sampling(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_bad_seed_is_named(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed is {seed}"):
        controls_of([Sampling()], [seed])
