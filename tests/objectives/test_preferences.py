"""Objectives over preferences, against trl and against what they mean.

Shapes: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import GOLDENS, golden, load_folder, write_folder
from tiny import GPT2, ONE, VOCABULARY, V, assert_close, make_run, model_of, sharp_params, steps

from jaxgpt.batch import Batch
from jaxgpt.config import DPO, GPT, IPO, KTO, ORPO, Chat, Pairs, Rated, SimPO, Train
from jaxgpt.data.packing import Item, PackedExamples
from jaxgpt.data.readers.pairs import CHOSEN, OTHER, REJECTED
from jaxgpt.errors import UserError
from jaxgpt.objectives import make_objective, means
from jaxgpt.objectives.preferences import document_sums
from jaxgpt.train.step import eval_step, loss_means

T = 32
TRL = {
    "dpo": DPO(beta=0.3),
    "cdpo": DPO(beta=0.3, label_smoothing=0.1),
    "ipo": IPO(beta=0.2),
    "simpo": SimPO(beta=2.0, margin=0.5),
    "orpo": ORPO(beta=0.4, nll_weight=0.0),
    "kto": KTO(beta=0.3, bad_weight=1.5),
}
"""What the losses of goldens/make_preferences.py are called here."""
EVERY = {
    "DPO": DPO(nll_weight=0.5, label_smoothing=0.2),
    "IPO": IPO(),
    "SimPO": SimPO(),
    "ORPO": ORPO(),
    "KTO": KTO(good_weight=2.0),
}
SMALL = replace(GPT2, layers=1)
Document = tuple[list[int], list[int], list[float], int]
"""A prompt, its completion, the reference's log-probability of each token of it, and the side."""


def rows_of(documents: list[Document], length: int, bins: int = 64) -> list[dict[str, np.ndarray]]:
    """Documents, two after each other an example, as readers pack them."""
    items, reference = [], []
    for prompt, completion, logprobs, side in documents:
        tokens, given = prompt + completion, [0.0] * (len(prompt) - 1)
        weights = [*given, *[1.0] * len(completion), 0.0]
        items.append(Item(tokens, [*tokens[1:], 0], weights, side=[side] * len(tokens)))
        reference += [*given, *logprobs, 0.0]
    rows = PackedExamples(items, length, bins, None, group=2)
    rows.columns["reference"] = np.float32(reference)
    return [rows[i] for i in range(len(rows))]


def batch_of(rows: list[dict[str, np.ndarray]]) -> Batch:
    columns = {name: jnp.stack([jnp.asarray(row[name]) for row in rows]) for name in rows[0]}
    extra = {name: columns.pop(name) for name in ("side", "reference")}
    return Batch(**{f"{name}_BT": column for name, column in columns.items()}, extra=extra)


def loss_and_gradient(
    config: Any, model: GPT, params: dict, batch: Batch
) -> tuple[float, dict[str, float], dict]:
    """The mean loss, the other means, and the gradient."""
    objective, whole = make_objective(config, VOCABULARY), model_of(model)

    def mean(params: dict) -> Any:
        sums = objective(whole(params), batch, None)
        return sums.loss / sums.weight, means(sums.metrics, sums.weight)

    (loss, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return float(loss), {name: float(value) for name, value in found.items()}, gradient


# ------------------------------------------------------------------------------------------------ trl


@cache
def trl_documents(paired: bool) -> list[Document]:
    held = json.loads(str(np.load(GOLDENS / "preferences.npz")["documents"]))
    made = []
    for i, prompt in enumerate(held["prompts"]):
        own = [("chosen", CHOSEN), ("rejected", REJECTED)]
        sides = own if paired else [own[i % 2], ("other", OTHER)]
        made += [(prompt, held[name][i], held[f"reference_{name}"][i], side) for name, side in sides]
    return made


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, dict]:
    stored = golden("gpt2")
    folder = write_folder(tmp_path_factory.mktemp("gpt2") / "hf", stored["config"], stored["tensors"])
    _, model, params = load_folder(folder)
    return model, params


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trl(name, imported) -> None:
    stored = np.load(GOLDENS / "preferences.npz")
    batch = batch_of(rows_of(trl_documents(name != "kto"), T))
    loss, found, gradient = loss_and_gradient(TRL[name], *imported, batch)
    assert loss == pytest.approx(float(stored[f"{name}/loss"]), rel=2e-5)
    own = {
        "wte": gradient["embed"]["weight"],
        "wpe": gradient["position"]["weight"],
        "ln_f": gradient["norm"]["scale"],
    }
    for short, ours in own.items():
        theirs = stored[f"{name}/{short}"]
        np.testing.assert_allclose(
            ours[: len(theirs)], theirs, atol=2e-5 * np.abs(theirs).max(), err_msg=short
        )
    if name == "kto":
        assert found["kl"] == pytest.approx(float(stored["kto/kl"]), rel=1e-5) and found["kl"] > 1


# ---------------------------------------------------------------------------------------- what they mean


def some_documents(count: int, paired: bool = True, seed: int = 0) -> list[Document]:
    """Examples of odd lengths that fit into rows of 16 alone or in twos."""
    random, made = np.random.default_rng(seed), list[Document]()
    for i in range(count):
        prompt = random.integers(1, V, 1 + i % 2).tolist()
        sides = (CHOSEN, REJECTED) if paired else ((CHOSEN, REJECTED)[i % 3 == 0], OTHER)
        for side in sides:
            completion = random.integers(1, V, random.integers(1, 3)).tolist()
            made.append((prompt, completion, random.uniform(-5, -3, len(completion)).tolist(), side))
    return made


@cache
def uneven(paired: bool) -> tuple[Batch, int]:
    """16 rows that hold different numbers of examples, and how many examples."""
    rows = rows_of(some_documents(40, paired), 16, bins=2)[:16]
    counts = [int(row["segments"].max()) // 2 for row in rows]
    assert len(rows) == 16 and len(set(counts)) > 1
    return batch_of(rows), sum(counts)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_microbatches_and_devices_change_no_update(name) -> None:
    """Sums over examples, and KTO's reference point over the whole step."""
    batch, count = uneven(name != "KTO")
    data = (Rated if name == "KTO" else Pairs)(train=("x",))
    parts = {"data": data, "objective": EVERY[name], "init_from": "x"}
    runs = [make_run(SMALL, train=Train(batch_size=16, accumulate=n), **parts) for n in (1, 4)]
    meshes = (ONE, ONE | {"data": 2, "fsdp": 2})
    (state, (metrics,)), (other, (found,)) = (
        steps(run, sizes, [batch]) for run, sizes in zip(runs, meshes, strict=True)
    )
    assert found == pytest.approx(metrics, rel=1e-4)
    assert_close(other.params, state.params, 1e-3)
    assert metrics["margin"] == pytest.approx(metrics["reward_chosen"] - metrics["reward_rejected"], rel=1e-5)
    assert metrics["weight"] == count


@pytest.mark.parametrize("name", EVERY)
def test_four_microbatches_equal_the_whole_batch(name) -> None:
    batch, count = uneven(name != "KTO")
    params, objective = sharp_params(SMALL), make_objective(EVERY[name], VOCABULARY)
    model = model_of(SMALL)
    whole, parts = (
        loss_means(
            [jax.jit(lambda p, b, n=n: eval_step(lambda: model(p), objective, n, b)[0])(params, batch)]
        )
        for n in (1, 4)
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    assert whole["targets"] == count


@pytest.mark.parametrize("name", EVERY)
def test_packed_examples_are_those_alone(name) -> None:
    """And rows of padding and empty places add nothing, to the gradient neither."""
    documents = some_documents(5, name != "KTO")
    params, width = sharp_params(SMALL), 8
    together = batch_of(rows_of(documents, 16))
    alone = [row for i in range(0, 10, 2) for row in rows_of(documents[i : i + 2], width)]
    alone += [{key: np.zeros_like(column) for key, column in alone[0].items()}]
    assert together.tokens_BT.shape[0] < 5
    a, b = (loss_and_gradient(EVERY[name], SMALL, params, batch) for batch in (together, batch_of(alone)))
    assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == pytest.approx(b[1], rel=1e-4, abs=1e-6)
    assert_close(a[2], b[2], 1e-4)


def test_figures_by_hand() -> None:
    """What is logged of two pairs, from log-probabilities of every document by itself."""
    documents = [([1, 2], [3, 4, 5], [], 1), ([1, 2], [6], [], 2), ([7], [8], [], 1), ([7], [9, 8], [], 2)]
    params = sharp_params(GPT2)

    def logprob(prompt: list[int], completion: list[int]) -> float:
        row = jnp.asarray([prompt + completion])
        ones_BT = jnp.ones_like(row)
        batch = Batch(row, row, ones_BT.astype(jnp.float32), ones_BT, jnp.arange(row.shape[1])[None])
        model = model_of(GPT2)(params)
        logits_TV = np.asarray(model.logits(model.hidden(batch, None).x_BTD)[0], np.float64)
        logits_TV -= np.log(np.exp(logits_TV).sum(1, keepdims=True))
        at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        return sum(logits_TV[t, token] for t, token in zip(at, completion, strict=True))

    said = [logprob(prompt, completion) for prompt, completion, _, _ in documents]
    against = [[-4.0, -3.0, -2.0], [-3.5], [-9.0], [-1.0, -1.0]]
    documents = [(p, c, ref, s) for (p, c, _, s), ref in zip(documents, against, strict=True)]
    batch = batch_of(rows_of(documents, 16))
    loss, found, _ = loss_and_gradient(DPO(beta=0.2, nll_weight=0.5), GPT2, params, batch)
    rewards = [0.2 * (own - sum(ref)) for own, ref in zip(said, against, strict=True)]
    assert found["reward_chosen"] == pytest.approx((rewards[0] + rewards[2]) / 2, rel=1e-4)
    assert found["reward_rejected"] == pytest.approx((rewards[1] + rewards[3]) / 2, rel=1e-4)
    assert rewards[0] < rewards[1] and rewards[2] > rewards[3] and found["accuracy"] == 0.5
    assert (found["length_chosen"], found["length_rejected"]) == (2.0, 1.5)
    nll = (-said[0] / 3 - said[2]) / 2
    assert found["chosen_nll"] == pytest.approx(nll, rel=1e-5)
    dpo = sum(math.log1p(math.exp(bad - good)) for good, bad in (rewards[:2], rewards[2:])) / 2
    assert loss == pytest.approx(dpo + 0.5 * nll, rel=1e-5)


def test_sums_of_documents_go_to_their_pairs() -> None:
    rows = rows_of([([1], [2, 3], [0, 0], 1), ([1], [2], [0], 2), ([4], [5], [0], 1), ([4], [6], [0], 2)], 12)
    batch = batch_of(rows)
    value_BT = jnp.arange(12.0)[None]  # documents at 0-2, 3-4, 5-6, 7-8
    assert document_sums(batch, value_BT, 1)[0].tolist() == [3, 11, 0, 0, 0, 0]
    assert document_sums(batch, value_BT, 2)[0].tolist() == [7, 15, 0, 0, 0, 0]


def test_objectives_and_data_that_do_not_belong_together_are_refused() -> None:
    pairs, rated = Pairs(train=("x",)), Rated(train=("x",))
    for data, objective, words in (
        (Chat(train=("x",)), DPO(), r"data is Chat but objective DPO\(\) .* set data to Pairs"),
        (rated, SimPO(), r"set data to Pairs"),
        (pairs, KTO(), r"set data to Rated"),
        (pairs, make_run().objective, r"objective is CausalLM\(\) but Pairs data .* DPO\(\), IPO\(\), SimPO"),
        (rated, make_run().objective, r"set it to one of: KTO\(\)"),
    ):
        with pytest.raises(UserError, match=words):
            make_run(data=data, objective=objective, init_from="x")
    with pytest.raises(UserError, match=r"DPO\(\) compares .* init_from is empty"):
        make_run(data=pairs, objective=DPO())
    assert make_run(data=pairs, objective=ORPO()).length == 2 * GPT2.context
    with pytest.raises(UserError, match=r"data.length 33 is more than twice model.context 16"):
        make_run(data=replace(pairs, length=33), objective=ORPO())
