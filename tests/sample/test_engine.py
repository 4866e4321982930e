"""The engine: a request gets the same alone, in company, by speculation, after preemption and from shared
pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HERE, ONE, mesh
from tiny_models import FLOAT32, MODELS, RECITED, VOCAB, full_logits, sharp_params

from jaxgpt.config import Batching, Sampling
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_model
from jaxgpt.sample import lanes
from jaxgpt.sample.constrained import choices, json_schema
from jaxgpt.sample.engine import Engine
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.pages import Pages
from jaxgpt.sample.request import Full, Piece, Request
from jaxgpt.sharding import param_shardings
from jaxgpt.text.tokenizer import ByteTokenizer

SMALL = Batching(slots=3, page=4, chunk=8)
SCARCE = replace(SMALL, pages=25)
"""One context and a little more: three long rows do not fit."""
KINDS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.8, top_k=20, top_p=0.9),
    Sampling(temperature=1.2, repetition_penalty=1.3, no_repeat_ngram=3, typical_p=0.9),
    Sampling(temperature=0, presence_penalty=0.6, frequency_penalty=1.9, logit_bias=((7, 4.0), (90, -100))),
    Sampling(top_p=0.95, presence_penalty=2, frequency_penalty=-1.5, logit_bias=((65, 3.5),)),
]


def ask(seed: int, length: int, most: int = 12, **more: Any) -> Request:
    """A request with a random prompt, which begins like those of the same seed."""
    prompt = np.random.default_rng(seed % 3).integers(0, 200, 80)[:length].tolist()
    return Request(prompt=prompt, max_new_tokens=most, sampling=KINDS[seed % 6], seed=seed, **more)


def serve(engine: Engine, requests: Sequence[Request]) -> list[list[Piece]]:
    """All of them at once, to their ends."""
    made: list[list[Piece]] = [[] for _ in requests]
    for request, pieces in zip(requests, made, strict=True):
        engine.submit(request, pieces.append)
    while engine.step():
        pass
    assert engine.load().pages_used == engine.load().running == engine.load().queued == 0
    return made


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [piece.id for piece in pieces if piece.id >= 0]


@pytest.fixture(scope="module")
def model(modern: tuple[Any, Any, Generator]) -> Generator:
    return modern[2]


@pytest.fixture(scope="module")
def poor(model: Generator) -> Generator:
    """A draft that knows nothing of the model."""
    params = jax.tree.map(lambda p: p[..., ::-1], sharp_params(MODELS["modern"]))
    return Generator(model.model, FLOAT32, params, ByteTokenizer())


@pytest.fixture(scope="module")
def alone(model: Generator) -> Any:
    """What each request gets from an engine that serves nothing else."""
    cache: dict[Any, list[Piece]] = {}

    def find(request: Request, batching: Batching = SMALL) -> list[Piece]:
        key = (*request.prompt, request.seed, request.max_new_tokens, request.alternatives)
        if key not in cache:
            cache[key] = serve(Engine(model, batching), [request])[0]
        return cache[key]

    return find


def test_it_gives_what_the_generator_gives(model: Generator) -> None:
    requests = [ask(seed, length) for seed, length in enumerate([1, 17, 40, 80, 9, 33])]
    for request, pieces in zip(requests, serve(Engine(model, SMALL), requests), strict=True):
        how = {"max_new_tokens": request.max_new_tokens, "seeds": [request.seed]}
        want = model.generate([request.prompt], request.sampling, **how)[0]
        assert ids(pieces) == want.ids
        assert "".join(piece.text for piece in pieces) == want.text
        np.testing.assert_allclose([p.logprob for p in pieces if p.id >= 0], want.logprobs, atol=1e-5)
        assert pieces[-1].finish_reason == want.finish_reason
        assert all(piece.finish_reason is None for piece in pieces[:-1])


def by_definition(prompt: Sequence[int], s: Sampling, most: int) -> list[int]:
    """Greedy decoding with what OpenAI documents of these settings, in numpy: the prompt counts nothing."""
    made, model, params = list[int](), MODELS["modern"], sharp_params(MODELS["modern"])
    bias_V = np.zeros(VOCAB, np.float32)
    for token, bias in s.logit_bias:
        bias_V[token] = bias
    for _ in range(most):
        padded = [*prompt, *made, *[0] * (64 - len(prompt) - len(made))]  # one length, so one program
        logits_V = full_logits(model, params, padded)[len(prompt) + len(made) - 1]
        count_V = np.bincount(made, minlength=VOCAB)
        logits_V = logits_V - count_V * s.frequency_penalty - (count_V > 0) * s.presence_penalty + bias_V
        made.append(int(np.argmax(logits_V[: ByteTokenizer().vocab_size])))
    return made


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=0, presence_penalty=2),
        Sampling(temperature=0, frequency_penalty=0.75),
        Sampling(temperature=0, presence_penalty=-2, frequency_penalty=-1.25),
        Sampling(temperature=0, logit_bias=((104, 100),)),
        Sampling(temperature=0, frequency_penalty=2, logit_bias=((104, 6), (101, -100), (0, 2.5))),
    ],
    ids=["presence", "frequency", "rewards", "ever the same", "all"],
)
@pytest.mark.parametrize("lookup", [0, 3])
def test_penalties_and_bias_do_what_is_defined(model: Generator, s: Sampling, lookup: int) -> None:
    prompts, most, told = [[*range(60, 70)] * 3, [*b"hello"]], 14, {"stop": ()}
    requests = [Request(prompt=prompt, max_new_tokens=most, sampling=s, **told) for prompt in prompts]
    requests += [replace(request, sampling=Sampling(temperature=0)) for request in requests]
    made = serve(Engine(model, replace(SMALL, lookup=lookup)), requests)
    for request, pieces in zip(requests, made, strict=True):
        assert ids(pieces) == by_definition(request.prompt, request.sampling, most)
    whole = model.generate(prompts, s, max_new_tokens=most, **told)
    assert [one.ids for one in whole] == [ids(pieces) for pieces in made[:2]]
    assert [ids(pieces) for pieces in made[:2]] != [ids(pieces) for pieces in made[2:]]


def test_only_those_who_ask_for_penalties_pay_for_them() -> None:
    plain = [kind for kind in KINDS if not (kind.logit_bias or kind.presence_penalty)]
    for ruled in (False, True):
        level = lanes.level_of(plain, ruled=ruled)
        assert not (lanes.LEVELS[level].counted or lanes.LEVELS[level].biased)
        assert lanes.level_of(KINDS, ruled=ruled) == len(lanes.LEVELS) - 1
    assert lanes.level_of([Sampling(temperature=0)], ruled=True) == lanes.RULED


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    plans=st.lists(
        st.tuples(
            st.integers(0, 11), st.integers(1, 70), st.integers(1, 24), st.integers(0, 12), st.booleans()
        ),
        min_size=2,
        max_size=8,
    )
)
def test_company_changes_no_bit(model: Generator, alone: Any, plans: list[Any]) -> None:
    """Under any schedule of joins and cancels, with so few pages that rows make room for each other."""
    engine, joins = Engine(model, SCARCE), sorted(plans, key=lambda plan: plan[3])
    made: list[list[Piece]] = [[] for _ in joins]
    handles = list[Any]()
    for turn in range(14):
        for i, (seed, length, most, when, _) in enumerate(joins):
            if when == turn:
                handles.append(engine.submit(ask(seed, length, most, owner=str(seed)), made[i].append))
        engine.step()
        for (_, _, _, when, cancel), handle in zip(joins, handles, strict=False):
            if cancel and when + 3 == turn:
                handle.cancel()
    while engine.step():
        pass
    assert engine.load().pages_used == 0
    for (seed, length, most, _, cancel), pieces in zip(joins, made, strict=True):
        want, cut = alone(ask(seed, length, most)), pieces[-1].finish_reason == "cancelled"
        assert cut <= cancel
        got = [piece[:2] for piece in pieces if piece.id >= 0]
        assert got == [piece[:2] for piece in want][: len(got) if cut else None]


@pytest.mark.parametrize("on_mesh", [False, True], ids=["", "on a mesh"])
def test_after_warming_up_no_request_compiles(
    model: Generator, alone: Any, on_mesh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With rules and without."""
    if on_mesh:
        parts = (model.model, FLOAT32, sharp_params(MODELS["modern"]), ByteTokenizer())
        model = Generator(*parts, mesh=mesh(ONE))
    engine = Engine(model, SMALL)
    engine.warm_up()
    serve(engine, [ask(0, 1, 1)])  # `place` and small programs of the host's
    requests = [ask(seed, length) for seed, length in enumerate([1, 4, 8, 30, 30, 4])]
    ruled = [replace(request, rule=choices(["yes", "no"]), apart=True) for request in requests]
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        made = serve(engine, [*requests, *ruled])
    assert "Compiling" not in caplog.text
    for request, pieces in zip(requests, made, strict=False):
        assert ids(pieces) == ids(alone(request))


def test_rows_that_made_room_are_the_same(model: Generator, alone: Any) -> None:
    requests = [ask(seed, 40, 40) for seed in (0, 1, 2, 5, 4)]
    engine = Engine(model, SCARCE)
    made = serve(engine, requests)
    assert engine.load().preemptions > 0
    for request, pieces in zip(requests, made, strict=True):
        assert [piece[:3] for piece in pieces] == [piece[:3] for piece in alone(request)]


@pytest.mark.parametrize("form", ["stacked", "tensor=2", "int8", "as many rows as run"])
def test_other_forms_of_the_cache(model: Generator, alone: Any, form: str) -> None:
    """That of accelerators, with the layers scanned; split over heads; in 8 bits, whose error shows first in
    log-probabilities.
    """
    on = mesh({"tensor": 2}) if form == "tensor=2" else None
    params = sharp_params(MODELS["modern"])
    if on is not None:
        params = jax.device_put(params, param_shardings(abstract_model(model.model, FLOAT32, HERE)[1], on))
    other = Generator(model.model, FLOAT32, params, ByteTokenizer(), mesh=on)
    if form == "stacked":
        other.target = replace(other.target, unroll=False)
        other.update(params)
    requests = [ask(seed, 20 + seed, 6) for seed in range(6)]
    batching = replace(
        SMALL, cache="int8" if form == "int8" else "float", exact=form != "as many rows as run"
    )
    for request, pieces in zip(requests, serve(Engine(other, batching), requests), strict=True):
        want = alone(request)
        if form == "int8":
            assert abs(pieces[0].logprob - want[0].logprob) < 0.1 or ids(pieces) != ids(want)
            assert pieces[0].id != want[0].id or pieces[0].logprob != want[0].logprob
        else:
            assert ids(pieces) == ids(want)
            np.testing.assert_allclose([p.logprob for p in pieces], [p.logprob for p in want], atol=1e-5)


def test_shared_beginnings_change_nothing_and_are_computed_once(model: Generator, alone: Any) -> None:
    requests = [ask(3 * i, 40 + i) for i in range(4)]  # the same beginning
    engine = Engine(model, SMALL)
    made = serve(engine, requests)
    assert engine.load().shared_tokens == 32 + 40 + 40  # whole chunks before the last token
    for request, pieces in zip(requests, made, strict=True):
        assert [piece[:3] for piece in pieces] == [piece[:3] for piece in alone(request)]


def test_prompt_look_up_changes_nothing(model: Generator, alone: Any) -> None:
    looped = [*range(60, 70)] * 3
    requests = [ask(seed, 30, 16) for seed in range(6)]
    requests += [replace(request, prompt=looped) for request in requests]
    for request, pieces in zip(
        requests, serve(Engine(model, replace(SMALL, lookup=3)), requests), strict=True
    ):
        want = alone(request)
        assert ids(pieces) == ids(want)
        assert "".join(p.text for p in pieces) == "".join(p.text for p in want)
        np.testing.assert_allclose([p.logprob for p in pieces], [p.logprob for p in want], atol=1e-5)


def test_a_draft_changes_nothing_and_a_good_one_is_followed(
    model: Generator, poor: Generator, alone: Any
) -> None:
    requests = [ask(seed, 20, 12) for seed in range(6)]
    for draft in (poor, model):
        engine = Engine(model, replace(SMALL, proposals=2), draft)
        for request, pieces in zip(requests, serve(engine, requests), strict=True):
            assert ids(pieces) == ids(alone(request))
        load = engine.load()
        if draft is model:
            assert load.accepted > 0.9 * load.proposed * 0.8


def test_drawn_tokens_follow_the_models_distribution(model: Generator, poor: Generator) -> None:
    """Chi-square of the second token against the model's own probabilities, with proposals from a draft."""
    prompt, count = [*range(65, 77)], 300
    first = Request(prompt=prompt, max_new_tokens=1, sampling=Sampling(), alternatives=20, stop=())
    engine = Engine(model, replace(SMALL, proposals=2), poor)
    likely = serve(engine, [first])[0][0].alternatives
    drawn = [
        Request(prompt=prompt, max_new_tokens=2, sampling=Sampling(), seed=seed, stop=())
        for seed in range(count)
    ]
    found = [
        pieces[0].id for part in range(0, count, 100) for pieces in serve(engine, drawn[part : part + 100])
    ]
    sure = [(token, np.exp(logprob)) for token, logprob in likely if np.exp(logprob) * count >= 5]
    rest = 1 - sum(p for _, p in sure)
    counts = [found.count(token) for token, _ in sure]
    expected = [count * p for _, p in sure]
    if rest * count >= 5:
        counts, expected = [*counts, count - sum(counts)], [*expected, rest * count]
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert len(expected) >= 2
    assert statistic < len(expected) - 1 + 4 * (2 * (len(expected) - 1)) ** 0.5  # four standard deviations


def test_alternatives_are_the_likeliest(model: Generator) -> None:
    request = replace(ask(0, 9, 4), alternatives=5)
    pieces = serve(Engine(model, SMALL), [request])[0]
    row = [*request.prompt, *ids(pieces)]
    logits_TV = full_logits(MODELS["modern"], sharp_params(MODELS["modern"]), row)
    for at, piece in enumerate(pieces, len(request.prompt) - 1):
        logp_V = logits_TV[at] - np.logaddexp.reduce(logits_TV[at])
        best = np.argsort(-logp_V[: ByteTokenizer().vocab_size])[:5]
        assert [one.id for one in piece.alternatives] == best.tolist()
        np.testing.assert_allclose([one.logprob for one in piece.alternatives], logp_V[best], atol=2e-5)


def test_rules_hold_beside_free_rows(model: Generator, alone: Any) -> None:
    rules = [choices(["yes", "no"]), json_schema({"type": "object", "properties": {"a": {"type": "boolean"}},
             "required": ["a"], "additionalProperties": False}), None]  # fmt: skip
    requests = [replace(ask(i, 20, 24), rule=rule, apart=True) for i, rule in enumerate(rules)]
    made = serve(Engine(model, SMALL), requests)
    texts = ["".join(piece.text for piece in pieces) for pieces in made]
    assert texts[0] in ("yes", "no")
    assert texts[1] in ('{"a": true}', '{"a": false}')
    assert ids(made[2]) == ids(alone(ask(2, 20, 24)))


@pytest.mark.parametrize("way", ["look-up", "draft"])
def test_rules_hold_where_tokens_are_proposed(model: Generator, way: str) -> None:
    """Also of rows that made room for others: what a rule allows is known for one token at a time."""
    rule = json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 9})
    prompts = [[*b"[1, 2, 1, 2, 1, 2, 1, 2]"], [*b"[7, 7, 7, 7, 7, 7, 7, 7, 7, 7"], [*b"[3], [3], [3]"]]
    requests = [
        replace(ask(i, 1, 50), prompt=prompt, rule=rule, apart=True, sampling=KINDS[i])
        for i, prompt in enumerate(prompts)
    ]
    requests.append(ask(0, 30, 40))
    alone = [serve(Engine(model, SMALL), [request])[0] for request in requests]
    speculating = {"lookup": 3} if way == "look-up" else {"proposals": 2}
    engine = Engine(model, replace(SCARCE, **speculating), None if way == "look-up" else model)
    made = serve(engine, requests)
    for pieces, want in zip(made, alone, strict=True):
        assert ids(pieces) == ids(want)
        assert pieces[-1].finish_reason == want[-1].finish_reason != "error"
    assert engine.load().preemptions > 0
    assert engine.load().accepted > 0 or way == "look-up"  # of the row without a rule


def test_stop_strings_and_whole_characters(reciter: Generator) -> None:
    prompt = [*b"x"]
    request = Request(prompt=prompt, max_new_tokens=20, sampling=Sampling(temperature=0))
    cut = replace(request, stop_strings=["🎉"])
    whole, short = serve(Engine(reciter, Batching(slots=2, page=4, chunk=8)), [request, cut])
    assert "".join(p.text for p in whole) == RECITED
    assert whole[-1].finish_reason == short[-1].finish_reason == "stop"
    assert "".join(p.text for p in short) == RECITED.removesuffix("🎉")
    assert all("\ufffd" not in p.text for p in whole)


def test_in_a_thread_with_a_full_queue_and_a_failing_receiver(model: Generator, alone: Any) -> None:
    made: list[Piece] = []

    def broken(piece: Piece) -> None:
        raise RuntimeError("receiver")

    engine = Engine(model, replace(SMALL, queue=2))
    engine.submit(ask(0, 20), broken)
    handle = engine.submit(ask(1, 20), made.append)
    with pytest.raises(Full, match="2 requests wait"):
        engine.submit(ask(2, 20), made.append)
    with engine:
        pass  # leaving waits for both
    assert ids(made) == ids(alone(handle.request))
    with pytest.raises(UserError, match="closing"):
        engine.submit(ask(0, 20), made.append)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 96}, "context"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"alternatives": 21}, "between 0 and 20"),
        ({"adapter": "none"}, "adapter"),
        ({"seed": -1}, "seed"),
        ({"stop": range(17)}, "allows 16"),
        ({"stop_strings": [""]}, "empty"),
        ({"sampling": Sampling(no_repeat_ngram=9)}, "0 to 8"),
        (
            {"sampling": Sampling(logit_bias=((VOCAB - 2, 1),))},
            f"the id {VOCAB - 2}; the tokenizer's are 0 to",
        ),
        (
            {"sampling": Sampling(logit_bias=tuple((i, 1) for i in range(1025)))},
            "1025 ids; an engine allows 1024",
        ),
    ],
)
def test_what_can_never_run_is_refused(model: Generator, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Engine(model, SMALL).submit(replace(ask(0, 10), **change), print)


def test_a_request_larger_than_the_cache_is_refused(model: Generator) -> None:
    engine = Engine(model, replace(SMALL, pages=4))
    with pytest.raises(UserError, match=r"raise batching\.pages"):
        engine.submit(ask(0, 10, 20), print)
    engine.submit(ask(0, 10, 6), print)  # 16 tokens: four pages


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=40))
def test_pages_are_never_lost_or_shared_by_mistake(plan: list[tuple[int, int]]) -> None:
    """Rows come, share, take and go: every page is free, kept or held, and held by one owner."""
    pages, rows = Pages(24), list[tuple[list[Any], list[int]]]()
    for seed, size in plan:
        if len(rows) == 3:
            path, own = rows.pop(0)
            pages.leave(path)
            pages.give_back(own)
        path, own, node = [], [], pages.root(0)
        for i in range(size):
            tokens = (seed, i)
            if (found := pages.follow(node, tokens)) is None:
                if (taken := pages.take(1)) is None:
                    break
                found = pages.keep(node, tokens, taken)
            path.append(node := found)
        own = pages.take(1) or []
        rows.append((path, own))
        held = {page for path, _ in rows for node in path for page in node.pages}
        alone = [page for _, own in rows for page in own]
        assert len(set(alone)) == len(alone)
        assert not held & set(alone)
        assert pages.used == len(held) + len(alone)
    for path, own in rows:
        pages.leave(path)
        pages.give_back(own)
    assert pages.used == 0
    taken = pages.take(23)
    assert sorted(taken or []) == list(range(1, 24))
