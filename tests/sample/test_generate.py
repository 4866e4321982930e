"""Generation against the full forward pass, and what a row's output may depend on."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
from tiny import HERE
from tiny_models import FLOAT32, RECITED, full_logits, program_of

from jaxgpt.config import GPT
from jaxgpt.errors import UserError
from jaxgpt.sample import program
from jaxgpt.sample.generate import Completion, Generator, Token
from jaxgpt.sample.program import bucket
from jaxgpt.sample.settings import Sampling
from jaxgpt.sharding import make_mesh, param_shardings
from jaxgpt.text.tokenizer import ByteTokenizer

Tiny = tuple[GPT, dict, Generator]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.3, top_k=200, top_p=0.98, repetition_penalty=1.1)
NEVER: tuple[int, ...] = ()
PROMPTS = [[5, 250, 7], list(range(40, 57)), [9] * 5 + list(range(100, 136))]


def joined(tokens: list[Token], row: int) -> Completion:
    """The completion that a stream's tokens of one row amount to."""
    mine = [t for t in tokens if t.row == row]
    assert [t.finish_reason is not None for t in mine] == [False] * (len(mine) - 1) + [True]
    reason = mine[-1].finish_reason
    assert reason is not None
    text = "".join(t.text for t in mine)
    return Completion([t.id for t in mine], [t.logprob for t in mine], reason, text, row)


def assert_same(a: Completion, b: Completion) -> None:
    assert (a.ids, a.finish_reason, a.text) == (b.ids, b.finish_reason, b.text)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_greedy_with_the_cache_equals_recomputing_the_full_forward(tiny: Tiny) -> None:
    model, params, generator = tiny
    made = generator.generate(PROMPTS, GREEDY, max_new_tokens=20, stop=NEVER)
    for prompt, completion in zip(PROMPTS, made, strict=True):
        logits_TV = full_logits(model, params, prompt + completion.ids)[len(prompt) - 1 : -1]
        expected = logits_TV[:, : ByteTokenizer().vocab_size].argmax(-1)
        assert completion.ids == expected.tolist()
        assert completion.finish_reason == "length" and len(completion.ids) == 20
        assert len(set(completion.ids)) > 4, "a constant output would show nothing"


def test_log_probabilities_are_those_of_the_full_forward(tiny: Tiny) -> None:
    model, params, generator = tiny
    made = generator.generate(PROMPTS, DRAWN, max_new_tokens=20, stop=NEVER, seeds=[3, 4, 5])
    for prompt, completion in zip(PROMPTS, made, strict=True):
        logits_TV = full_logits(model, params, prompt + completion.ids)[len(prompt) - 1 : -1]
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        expected = logprobs_TV[np.arange(len(completion.ids)), completion.ids]
        np.testing.assert_allclose(completion.logprobs, expected, atol=3e-5)


def test_a_row_depends_on_nothing_but_itself(tiny: Tiny) -> None:
    """Alone it has a shorter bucket, another batch size and other neighbours."""
    generator, seeds = tiny[2], [11, 12, 13]
    together = generator.generate(PROMPTS, DRAWN, max_new_tokens=20, seeds=seeds)
    alone = generator.generate(PROMPTS[:1], DRAWN, max_new_tokens=20, seeds=seeds[:1])
    assert_same(together[0], alone[0])
    order = [2, 0, 1]
    turned = generator.generate(
        [PROMPTS[i] for i in order], DRAWN, max_new_tokens=20, seeds=[seeds[i] for i in order]
    )
    for place, i in enumerate(order):
        assert_same(turned[place], together[i])


def test_streaming_equals_the_batch(tiny: Tiny) -> None:
    generator = tiny[2]
    made = generator.generate(PROMPTS, DRAWN, max_new_tokens=20, seeds=[1, 2, 3])
    for chunk in (1, 7):
        tokens = list(generator.stream(PROMPTS, DRAWN, max_new_tokens=20, seeds=[1, 2, 3], chunk=chunk))
        for row, completion in enumerate(made):
            assert_same(joined(tokens, row), completion)


def test_seeds_repeat_and_differ_and_a_longer_limit_only_adds(modern: Tiny) -> None:
    generator, prompts = modern[2], [PROMPTS[2]] * 3
    made = generator.generate(prompts, DRAWN, max_new_tokens=18, seeds=[8, 9, 8], stop=NEVER)
    assert_same(made[0], made[2])
    assert made[0].ids != made[1].ids
    longer = generator.generate(prompts, DRAWN, max_new_tokens=23, seeds=[8, 9, 8], stop=NEVER)
    assert longer[0].ids[:18] == made[0].ids


def test_going_on_from_what_was_made_gives_the_same_tokens(modern: Tiny) -> None:
    generator, prompt = modern[2], PROMPTS[0]
    first = generator.generate([prompt], DRAWN, max_new_tokens=20, seeds=[4], stop=NEVER)[0]
    again = prompt + first.ids[:8]
    rest = generator.generate([again], DRAWN, max_new_tokens=12, seeds=[4], stop=NEVER)[0]
    assert rest.ids == first.ids[8:]


def test_each_stop_token_ends_its_row_and_no_other(modern: Tiny) -> None:
    generator = modern[2]
    full = generator.generate(PROMPTS, GREEDY, max_new_tokens=20, stop=NEVER)
    stops = [full[0].ids[3], full[1].ids[6]]
    made = generator.generate(PROMPTS, GREEDY, max_new_tokens=20, stop=stops)
    for whole, completion in zip(full, made, strict=True):
        hits = [i for i, token in enumerate(whole.ids) if token in stops]
        assert completion.finish_reason == ("stop" if hits else "length")
        assert completion.ids == whole.ids[: hits[0] + 1 if hits else 20]
        assert len(completion.logprobs) == len(completion.ids)


def test_the_loop_ends_with_its_last_row(modern: Tiny) -> None:
    generator = modern[2]
    prog, rows = program_of(generator, PROMPTS, DRAWN, 20, [0, 1, 2], None)
    state, _ = program.prefill(prog, generator.params, rows)
    rows = rows._replace(end_B=rows.length_B + np.asarray([4, 2, 3], np.int32))
    state, made = program.decode(prog, generator.params, rows, state, np.int32(50))
    assert (made.length_B - rows.length_B).tolist() == [4, 2, 3]
    beyond_BS = np.arange(prog.slots) >= made.length_B[:, None]
    assert not np.asarray(made.tokens_BS)[beyond_BS].any()


def test_padding_rows_of_the_vocabulary_never_come_out(modern: Tiny) -> None:
    hot = Sampling(temperature=50.0, top_k=264, top_p=0.999, repetition_penalty=1.1)
    for start in range(0, 12, 3):
        seeds = range(start, start + 3)
        made = modern[2].generate(PROMPTS, hot, max_new_tokens=20, stop=NEVER, seeds=seeds)
        assert max(max(c.ids) for c in made) < ByteTokenizer().vocab_size


def test_nothing_is_compiled_again_when_only_values_change(modern: Tiny) -> None:
    sizes = []
    for temperature, top_k, seed, new, stop, prompt in (
        (0.7, 5, 0, 20, None, [1, 2, 3]),
        (1.9, 9, 7, 11, [65], [1] * 15),
    ):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=0.5, repetition_penalty=1.2)
        modern[2].generate([prompt], sampling, max_new_tokens=new, seeds=[seed], stop=stop)
        sizes.append(program.generate._cache_size())
    assert sizes[0] == sizes[1] > 0


def test_the_stream_reuses_the_cache_memory(modern: Tiny) -> None:
    generator = modern[2]
    prog, rows = program_of(generator, PROMPTS, DRAWN, 20, [0, 1, 2], None)
    state, _ = program.prefill(prog, generator.params, rows)
    program.decode(prog, generator.params, rows, state, np.int32(2))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))


def spread(model: GPT, params: dict, sizes: dict[str, int]) -> Generator:
    """A generator over eight devices, fed with parameters that lie there as in training."""
    assert jax.device_count() >= 8
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices()[:8])
    shardings = param_shardings(program.abstract_model(model, FLOAT32, HERE)[1], mesh)
    placed = jax.device_put(params, shardings)
    return Generator(model, FLOAT32, placed, ByteTokenizer(), mesh=mesh)


def test_eight_devices_equal_one(tiny: Tiny) -> None:
    model, params, generator = tiny
    eight = spread(model, params, {"data": 2, "fsdp": 2, "tensor": 2})
    weight = eight.params["blocks"][0]["mlp"]["up"]["weight"]
    assert weight.addressable_shards[0].data.size * 4 == weight.size
    one = generator.generate(PROMPTS, DRAWN, max_new_tokens=20)
    for a, b in zip(one, eight.generate(PROMPTS, DRAWN, max_new_tokens=20), strict=True):
        assert_same(a, b)


def test_eight_devices_stream_as_one_with_fewer_rows_than_devices(modern: Tiny) -> None:
    model, params, generator = modern
    eight = spread(model, params, {"data": 8})
    tokens = list(eight.stream(PROMPTS, DRAWN, max_new_tokens=20))
    for row, a in enumerate(generator.generate(PROMPTS, DRAWN, max_new_tokens=20)):
        assert_same(joined(tokens, row), a)


def test_characters_are_never_split(reciter: Generator) -> None:
    prompt = [ord("x")]
    tokens = list(reciter.stream([prompt], GREEDY, max_new_tokens=20, chunk=1))
    assert [t.text for t in tokens if t.text] == list(RECITED)
    assert tokens[-1].finish_reason == "stop"
    cut = list(reciter.stream([prompt], GREEDY, max_new_tokens=4))  # in the middle of the second
    assert "".join(t.text for t in cut) == "é\N{REPLACEMENT CHARACTER}"
    assert cut[-1].finish_reason == "length"


def test_the_context_bounds_prompt_and_answer(
    reciter: Generator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reciter, "_told", False)
    room = reciter.model.context
    made = reciter.generate([[1] * (room - 2), [1]], GREEDY, max_new_tokens=9, stop=NEVER)
    assert [len(c.ids) for c in made] == [2, 9]
    assert made[0].finish_reason == "length"
    reciter.generate([[1] * (room - 2)], GREEDY, max_new_tokens=9, stop=NEVER)
    assert caplog.text.count("max_new_tokens is cut") == 1
    for length in (room, room + 1):
        with pytest.raises(UserError, match=rf"prompt 1 has {length} tokens .* context is {room}"):
            reciter.generate([[1], [1] * length], GREEDY)


def test_bad_calls_are_one_sentence(reciter: Generator) -> None:
    with pytest.raises(UserError, match="prompt 0 is empty"):
        reciter.generate([[]])
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        reciter.generate([[1]], max_new_tokens=0)
    with pytest.raises(UserError, match="seeds has 2 entries for 1 prompts"):
        reciter.generate([[1]], seeds=[1, 2])
    with pytest.raises(UserError, match="id 9999"):
        reciter.generate([[9999]])
    assert reciter.generate([]) == []
    small = GPT(vocab_size=10, context=8, layers=1, width=8, heads=1)
    with pytest.raises(UserError, match="tokenizer has 264 ids but the model only 10"):
        Generator(small, FLOAT32, {}, ByteTokenizer())


def test_bfloat16_keeps_weights_and_cache_in_it(modern: Tiny) -> None:
    model, params, _ = modern
    generator = Generator(model, program.Compute(dtype="bfloat16"), params, ByteTokenizer())
    assert generator.params["embed"]["weight"].dtype == "bfloat16"
    assert generator.params["norm"]["scale"].dtype == "float32"
    prog, rows = program_of(generator, [[1, 2]], GREEDY, 4, [0], None)
    shapes = jax.eval_shape(prog.prefill, generator.params, rows)
    assert shapes.cache[0].k.dtype == "bfloat16"


def test_buckets_are_few_and_bounded() -> None:
    assert [bucket(n, 4096) for n in (1, 32, 33, 500, 513, 1025)] == [32, 32, 64, 512, 1024, 1536]
    assert bucket(700, 800) == 800
    assert len({bucket(n, 2048) for n in range(1, 2049)}) == 8


def test_logits_that_are_not_finite_end_their_row_alone(reciter: Generator) -> None:
    """Parameters of one token are NaN: the row that comes to it ends there, the other does not."""
    params = jax.tree.map(np.array, reciter.params)
    second = "日".encode()[0]
    params["embed"]["weight"][second] = np.nan
    broken = copy.copy(reciter)
    broken.params = params
    prompts = [[ord("x")], ["日".encode()[1]], [second]]
    good, others, none = broken.generate(prompts, GREEDY, max_new_tokens=20)
    assert (good.finish_reason, good.text, good.ids) == ("error", "é\ufffd", [*"é".encode(), second])
    assert np.isfinite(good.logprobs).all() and len(good.logprobs) == 3
    assert others.finish_reason == "stop"
    assert (none.ids, none.logprobs, none.finish_reason) == ([], [], "error")
    for chunk in (1, 4):
        tokens = list(broken.stream(prompts, GREEDY, max_new_tokens=20, chunk=chunk))
        mine = [t for t in tokens if t.row == 0]
        assert [t.id for t in mine] == [*good.ids, -1]
        assert [t.finish_reason for t in mine] == [None] * 3 + ["error"]
        assert "".join(t.text for t in mine) == good.text
        assert [(t.id, t.finish_reason) for t in tokens if t.row == 2] == [(-1, "error")]
    cut = broken.generate(prompts, GREEDY, max_new_tokens=20, stop_strings=["?"])
    assert [c.finish_reason for c in cut] == ["error", "stop", "error"]
    assert reciter.generate([[ord("x")]], GREEDY, max_new_tokens=20)[0].text == RECITED
