"""Beam search against every text there is, against transformers, and what its result may depend on."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import Numbers, golden, load_folder, write_folder
from tiny import FLOAT32, HERE, model_of, plain
from tiny_models import MODELS, SIZE, full_logits, sharp_params

from jaxgpt.aot import hlo
from jaxgpt.config import GPT, Beam, Sampling, TransformerXL
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_model
from jaxgpt.sample.beam import Knobs, Search, beam_search
from jaxgpt.sample.generate import Completion, Generator
from jaxgpt.sharding import make_mesh, param_shardings
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 250, 7], list(range(40, 57)), [9] * 5 + list(range(100, 136))]
HOW, CALL = Beam(beams=4, no_repeat_ngram=3), {"max_new_tokens": 20, "stop": [77, 3, 30]}
GPU = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
XL: Any = TransformerXL(**SIZE, layers=2, width=32, heads=4, mlp_width=64, memory=6, eval_memory=40)
Tiny = tuple[GPT, dict, Generator]


class Few(ByteTokenizer):
    """Four ids."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.control = 4, {}


def ids_and_scores(completion: Completion) -> tuple[list[list[int]], list[float]]:
    return [c.ids for c in completion.candidates], [c.score or 0.0 for c in completion.candidates]


def assert_alike(a: Completion, b: Completion) -> None:
    assert ids_and_scores(a)[0] == ids_and_scores(b)[0]
    np.testing.assert_allclose(ids_and_scores(a)[1], ids_and_scores(b)[1], atol=1e-5)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=3e-5)


# ------------------------------------------------------------------------- every text of a tiny vocabulary

FEW = replace(MODELS["modern"], vocab_size=6, context=16)  # two ids stand for nothing
END, NEW, PROMPT = 0, 4, [1, 3, 2]


@pytest.fixture(scope="module")
def few() -> tuple[dict, Generator]:
    params = sharp_params(FEW)
    return params, Generator(FEW, FLOAT32, params, Few())


@pytest.fixture(scope="module")
def every(few: tuple[dict, Generator]) -> dict[tuple[int, ...], float]:
    """Each text that may follow `PROMPT`, and its log-probability by full forward passes."""
    whole = list(itertools.product(range(4), repeat=NEW))
    rows = jnp.asarray([[*PROMPT, *text] for text in whole])

    @jax.jit
    def logits(params: dict) -> jax.Array:
        model = model_of(FEW)(params)
        return model.logits(model.hidden(plain(rows)).x_BTD)

    logprob_BTV = np.asarray(jax.nn.log_softmax(logits(few[0])))[:, len(PROMPT) - 1 :]
    found = {}
    for row, text in enumerate(whole):
        size = next((i + 1 for i, token in enumerate(text) if token == END), NEW)
        found[text[:size]] = sum(float(logprob_BTV[row, i, token]) for i, token in enumerate(text[:size]))
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
def test_with_a_beam_for_every_text_all_are_found_in_order(
    few: tuple[dict, Generator], every: dict[tuple[int, ...], float], penalty: float
) -> None:
    expected = sorted(every, key=lambda text: -every[text] / len(text) ** penalty)
    how = Beam(beams=128, length_penalty=penalty, early_stopping="never")
    made = few[1].generate([PROMPT], how, max_new_tokens=NEW, stop=[END])[0]
    ids, scores = ids_and_scores(made)
    assert len(ids) == len(every) == 3**NEW + sum(3**i for i in range(NEW))
    assert ids == [[*text] for text in expected]
    np.testing.assert_allclose(scores, [every[t] / len(t) ** penalty for t in expected], rtol=1e-4)
    assert (made.ids, made.score) == (ids[0], scores[0])
    assert made.finish_reason == ("stop" if ids[0][-1] == END else "length")
    assert sum(made.logprobs) == pytest.approx(every[expected[0]], rel=1e-4)


def test_a_text_without_repeats_ends_where_nothing_may_follow(
    few: tuple[dict, Generator], every: dict[tuple[int, ...], float]
) -> None:
    """Each token once: after those of the prompt only one is left, or none that does not end the text."""
    call: dict[str, Any] = {"max_new_tokens": NEW, "stop": ()}
    made = few[1].generate([[1, 3]], Beam(beams=3, no_repeat_ngram=1), **call)[0]
    ids, _ = ids_and_scores(made)
    assert sorted(ids) == [[0, 2], [2, 0]] and made.finish_reason == "length"
    drawn = few[1].generate([[1, 3]] * 8, Sampling(no_repeat_ngram=1), **call)
    assert {tuple(c.ids) for c in drawn} == {(0, 2), (2, 0)}
    assert {c.finish_reason for c in drawn} == {"length"}
    assert few[1].generate([[1, 3, 0, 2]], Beam(beams=3, no_repeat_ngram=1), **call)[0].ids == []
    tokens = list(few[1].stream([[1, 3, 0, 2], [1, 3]], Sampling(no_repeat_ngram=1), **call))
    assert [(t.id, t.finish_reason) for t in tokens if t.row == 0] == [(-1, "length")]
    assert [t.finish_reason for t in tokens if t.row == 1][-1] == "length"


# ------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generator]:
    found = {}
    for name in ("gpt2", "llama"):
        stored = golden(name)
        folder = write_folder(tmp_path_factory.mktemp(name), stored["config"], stored["tensors"])
        _, model, params = load_folder(folder)
        found[name] = Generator(model, FLOAT32, params, Numbers())
    return found


def test_texts_and_scores_are_those_of_transformers(families: dict[str, Generator]) -> None:
    stored = np.load(GOLDENS / "beams.npz")
    lengths, seen = stored["lengths"].tolist(), set()
    for number, case in enumerate(json.loads(str(stored["cases"]))):
        family, how = case.pop("family"), Beam(**case)
        prompts = [
            row[:length].tolist() for row, length in zip(golden(family)["tokens"], lengths, strict=True)
        ]
        call: dict[str, Any] = {"max_new_tokens": int(stored["new"]), "stop": stored["stop"].tolist()}
        made = families[family].generate(prompts, how, **call)
        for row, completion in enumerate(made, number * len(lengths)):
            ids, scores = ids_and_scores(completion)
            expected = stored["ids"][row, : how.beams]
            assert ids == [text[text >= 0].tolist() for text in expected], (family, how)
            np.testing.assert_allclose(scores, stored["scores"][row, : how.beams], rtol=1e-4)
            if family == "gpt2":
                seen.add((how.length_penalty, row % 2, str(ids)))
    assert len(seen) > len({key[:2] for key in seen}), "the rules of stopping differ"


# ------------------------------------------------------------------------------------------------ groups


def slow_groups(params: dict, how: Beam, prompt: list[int], new: int) -> list[list[int]]:
    """Diverse beam search by the paper's section 3, a token at a time, of texts that nothing ends."""
    size, open_texts = how.beams // how.groups, [[(0.0, [])] for _ in range(how.groups)]
    for _ in range(new):
        chosen: list[int] = []
        for g, texts in enumerate(open_texts):
            grown = []
            for value, ids in texts:
                logprob_V = log_probabilities(params, prompt + ids)
                for token in range(ByteTokenizer().vocab_size):
                    cost = how.diversity * chosen.count(token)
                    grown.append((value + float(logprob_V[token]) - cost, [*ids, token]))
            open_texts[g] = sorted(grown, key=lambda text: -text[0])[:size]
            chosen += [ids[-1] for _, ids in open_texts[g]]
    return [ids for texts in open_texts for _, ids in texts]


def log_probabilities(params: dict, ids: list[int]) -> np.ndarray:
    padded = ids + [0] * (24 - len(ids))  # causality hides them, and one program does
    return np.asarray(jax.nn.log_softmax(full_logits(MODELS["modern"], params, padded)[len(ids) - 1]))


def test_groups_pay_for_what_groups_before_them_chose(modern: Tiny) -> None:
    _, params, generator = modern
    call: dict[str, Any] = {"max_new_tokens": 5, "stop": ()}
    how = Beam(beams=6, groups=3, diversity=1.5)
    expected = slow_groups(params, how, PROMPTS[0], 5)
    found = generator.generate(PROMPTS[:2], how, **call)[0]
    assert sorted(ids_and_scores(found)[0]) == sorted(expected)
    assert found.score == max(c.score or -9e9 for c in found.candidates)
    for candidate in found.candidates:  # the cost is no part of the score
        assert candidate.score == pytest.approx(sum(candidate.logprobs) / 5, rel=1e-5)
    free = generator.generate(PROMPTS[:2], replace(how, diversity=0.0), **call)[0]
    assert sorted(ids_and_scores(free)[0]) == sorted(
        slow_groups(params, replace(how, groups=1, beams=2), PROMPTS[0], 5) * 3
    )
    assert len({str(c.ids) for c in found.candidates}) == 6, "the cost keeps groups apart"
    with pytest.raises(UserError, match="beams is 4 and groups 3; make beams a multiple of groups"):
        Beam(beams=4, groups=3)


# --------------------------------------------------------------------------- what a result may depend on


def test_one_beam_is_greedy_decoding(modern: Tiny) -> None:
    call: dict[str, Any] = {"max_new_tokens": 12, "stop": [77]}
    one = modern[2].generate(PROMPTS, Beam(beams=1, no_repeat_ngram=1), **call)
    greedy = modern[2].generate(PROMPTS, replace(GREEDY, no_repeat_ngram=1), **call)
    assert [c.ids for c in one] == [c.ids for c in greedy]
    for a, b in zip(one, greedy, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert (a.finish_reason, a.text) == (b.finish_reason, b.text)


def test_a_prompt_depends_on_nothing_but_itself(modern: Tiny) -> None:
    """Alone it has a shorter bucket and no neighbours; limits and stops are as each prompt's."""
    together = modern[2].generate(PROMPTS, HOW, **CALL)
    assert_alike(together[0], modern[2].generate(PROMPTS[:1], HOW, **CALL)[0])
    turned = modern[2].generate(PROMPTS[::-1], HOW, **CALL)
    for a, b in zip(together, turned[::-1], strict=True):
        assert_alike(a, b)


def test_the_accelerators_program_finds_the_same(modern: Tiny) -> None:
    """Layers scanned, with the cache as carry."""
    scanned = on_target(modern, GPU)
    for a, b in zip(*(g.generate(PROMPTS, HOW, **CALL) for g in (modern[2], scanned)), strict=True):
        assert_alike(a, b)


def test_the_cache_of_transformer_xl_is_exchanged_too() -> None:
    """The score of each text is what a full forward pass gives it."""
    params = sharp_params(XL)
    generator = Generator(XL, FLOAT32, params, ByteTokenizer())
    call: dict[str, Any] = {"max_new_tokens": 5, "stop": ()}
    made = on_target((XL, params, generator), GPU).generate(PROMPTS[:1], Beam(beams=3), **call)[0]
    for text in made.candidates:
        logits_TV = full_logits(XL, params, PROMPTS[0] + text.ids)[len(PROMPTS[0]) - 1 : -1]
        logprob_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        assert text.score == pytest.approx(logprob_TV[np.arange(5), text.ids].mean(), abs=3e-5)


def on_target(tiny: Any, target: Target) -> Generator:
    _, params, generator = tiny
    other = copy.copy(generator)
    other.target = target
    other.update(params)
    return other


def test_beams_stay_on_their_devices(modern: Tiny) -> None:
    """On a mesh the same texts are found, and no part of the cache crosses devices."""
    model, params, generator = modern
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    placed = jax.device_put(params, param_shardings(abstract_model(model, FLOAT32, HERE)[1], mesh))
    spread = Generator(model, FLOAT32, placed, ByteTokenizer(), mesh=mesh)
    several = spread.asked(PROMPTS, HOW, CALL).times(HOW.beams)
    prog, rows = spread.program(several, [Sampling(no_repeat_ngram=3)] * len(several.prompts), HOW.beams)
    search, knobs = Search(prog, 1, HOW.early_stopping), Knobs(np.float32(1), np.float32(0))
    with jax.set_mesh(mesh):
        compiled = beam_search.lower(search, spread.params, rows, knobs).compile()
        found = jax.device_get(compiled(spread.params, rows, knobs))
    for i, one in enumerate(generator.generate(PROMPTS, HOW, **CALL)):
        ids = found.made.tokens_BS[i * HOW.beams, len(PROMPTS[i]) : found.made.length_B[i * HOW.beams]]
        assert ids.tolist() == one.ids
        np.testing.assert_allclose(found.score_N[i * HOW.beams], one.score, atol=1e-5)
    inside = [one for one in hlo.read(compiled.as_text(), mesh.shape).collectives if one.depth]
    assert inside
    assert len(inside) <= 2 * model.layers + 7, "two sums a layer, the embedding's, logits, and what is small"
    sizes = {c.kind: max(array.nbytes for array in c.whole) for c in inside if c.kind != "all-to-all"}
    assert max(sizes.values()) <= 4 * len(rows.length_B) * model.width


def test_nothing_is_compiled_again_when_only_values_change(modern: Tiny) -> None:
    sizes = []
    for penalty, new, stop in ((0.5, 12, (77,)), (1.7, 9, (3, 30))):
        modern[2].generate(PROMPTS[:1], Beam(length_penalty=penalty), max_new_tokens=new, stop=stop)
        sizes.append(beam_search._cache_size())
    assert sizes[0] == sizes[1] > 0
