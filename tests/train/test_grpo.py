"""Learning from rewards: what the loop, the sampler and the loss make of each other.

Shapes: B rows, S slots.
"""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import FLOAT32, ONE, assert_same, mesh, model_of
from tiny_runs import interrupt_at, records, restore

from jaxgpt.config import GPT, GRPO, Full, LoRA, Mesh, Optim, Prompts, Run, Train, load
from jaxgpt.config.code import trusting
from jaxgpt.errors import UserError
from jaxgpt.evals.rewards import rewards_of
from jaxgpt.objectives import make_objective
from jaxgpt.report.measure import measure
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.loop import train
from jaxgpt.train.rollout import Rollouts, advantages
from jaxgpt.train.state import init_state, make_program

MODEL = GPT(vocab_size=270, context=24, layers=1, width=16, heads=2)  # more rows than the tokenizer has ids


def near_b(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 for the completion `b`, a quarter for another letter."""
    return 1.0 if completion == "b" else 0.25 * (completion.isascii() and completion.isalpha())


def has_vowels(prompt: str, completion: str, record: dict[str, Any]) -> int:
    return sum(c in "aeiou" for c in completion)


def as_asked(prompt: str, completion: str, record: dict[str, Any]) -> bool:
    return record["answer"] in completion and prompt == record["prompt"]


def raises(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return 1 / 0


def not_a_number(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return math.nan


def a_word(prompt: str, completion: str, record: dict[str, Any]) -> Any:
    return "good"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts, all different; a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("prompts")
    ByteTokenizer().save(folder / "tokenizer")
    lines = [{"prompt": f"say {i}", "answer": "b"} for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "a.jsonl"


OPTIM = Optim(peak_lr=2e-2, final_lr=2e-2, schedule="constant", warmup_steps=0, weight_decay=0.0)


def grpo_run(prompts: Path, runs: Path, steps: int = 4, objective: GRPO | None = None, **parts: Any) -> Run:
    given = {
        "name": "grpo",
        "model": MODEL,
        "objective": objective or GRPO(rewards=(near_b,), group=8, max_new_tokens=1),
        "optim": OPTIM,
        "train": Train(steps=steps, batch_size=64, log_every=1, eval_every=steps, save_every=steps),
        "compute": replace(FLOAT32, unroll=1),
        "mesh": Mesh(data=8),
    }
    data = Prompts(train=(str(prompts),), tokenizer=str(prompts.parent / "tokenizer"))
    return Run(data=data, runs=str(runs), **(given | parts))


def rollouts_of(run: Run, sizes: dict[str, int] = ONE) -> tuple[Rollouts, Any]:
    """What makes a run's rollouts on a mesh, and sharp parameters."""
    program = make_program(run, mesh(sizes))
    params = jax.tree.map(lambda p: p * 3.0, init_state(run, program).params)
    made = Rollouts(run, ByteTokenizer())
    made.begin(program)
    made.use(1, params)
    return made, params


@pytest.fixture(scope="module")
def learned(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, float]:
    """A run that learned a bandit of 264 arms, and its best score."""
    run = grpo_run(prompts, tmp_path_factory.mktemp("runs"), steps=50)
    return run, train(run, progress=False).best


def test_a_bandits_best_arm_is_found_in_fifty_steps(learned: tuple[Run, float]) -> None:
    run, best = learned
    seen = records(run.folder, "reward")
    assert best == -1.0  # the best arm itself, greedily
    assert seen[0]["reward"] < 0.25 < 0.35 < seen[-1]["reward"]  # as drawn: other letters earn a quarter
    assert seen[-1]["entropy"] < 0.7 * seen[0]["entropy"]
    assert all(r["logprob_gap"] < 1e-4 and r["clip_share"] == 0 for r in seen)  # one update per rollout


def test_a_runs_rewards_travel_with_it(learned: tuple[Run, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored by name, copied, loaded from the copy where it is trusted; and measured again."""
    folder = learned[0].folder
    assert json.loads((folder / "config.json").read_text())["run"]["objective"]["rewards"] == [
        f"{Path(__file__).name}:near_b"
    ]
    copy = folder / "code" / Path(__file__).name
    assert copy.read_bytes() == Path(__file__).read_bytes()
    run = load(folder)
    assert run.objective.rewards == (f"{copy}:near_b",)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "nobody"))
    with pytest.raises(UserError, match="holds Python code that came with the run and that you have not run"):
        Rollouts(run, ByteTokenizer())
    with trusting(True):
        found = rewards_of(load_trained(folder))
    assert found["reward"] == records(folder, "val_reward")[-1]["val_reward"]
    assert measure(learned[0])["val_reward"] == 1.0


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.7}, {"temperature": 1.6, "top_k": 20}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}],
    ids=str,
)
def test_the_samplers_log_probabilities_are_the_trainers(how: Any, prompts: Path, tmp_path: Path) -> None:
    """With ids that no token has, stop tokens, windows, capped logits and prompts of two lengths."""
    objective = GRPO(rewards=(has_vowels,), group=4, max_new_tokens=12, **how)
    model = GPT(
        vocab_size=270, context=40, layers=2, width=32, heads=4, kv_heads=2, position="rope", norm="rmsnorm",
        mlp="swiglu", bias=False, qk_norm=True, logit_softcap=20.0, windows=(6, 0),
    )  # fmt: skip
    run = grpo_run(prompts, tmp_path, objective=objective, model=model)
    made, params = rollouts_of(run)
    batch = next(made)
    assert made.progress(1)["completion_length"] > 2
    judged = make_objective(run.objective, Vocabulary.of(ByteTokenizer()))
    found = jax.jit(lambda params, batch: judged(model_of(model)(params), batch, None).metrics)(params, batch)
    assert 0 < float(found["logprob_gap"].mean()) < 1e-4
    assert 0.3 < float(found["entropy"].mean()) < 5.4


def test_rows_of_a_group_that_share_a_prefill_are_those_of_their_own(prompts: Path, tmp_path: Path) -> None:
    objective = GRPO(rewards=(has_vowels,), group=4, max_new_tokens=12, temperature=0.8, top_k=50)
    made, _ = rollouts_of(grpo_run(prompts, tmp_path, objective=objective))
    numbers, how = range(3, 11), made._drawing
    shared = made._complete(made._draw, how, made.rows, numbers, 4, 0)
    alone = made._sampler(make_program(made.run, made._mesh), how, 1)
    apart = made._complete(alone, how, made.rows, numbers, 4, 0)
    np.testing.assert_array_equal(shared.tokens_BS, apart.tokens_BS)
    np.testing.assert_array_equal(shared.kept_BS, apart.kept_BS)
    np.testing.assert_allclose(shared.logprobs_BS, apart.logprobs_BS, atol=1e-5)
    completions = {tuple(row) for row in shared.tokens_BS[:4]}
    assert len(completions) > 1  # each with a seed of its own


def test_eight_devices_make_the_rollout_of_one(prompts: Path, tmp_path: Path) -> None:
    """Prompts spread over four of them and heads over two; tokens, rewards and what the loss needs."""
    objective = GRPO(rewards=(has_vowels,), group=8, max_new_tokens=6, top_p=0.9)
    run = grpo_run(prompts, tmp_path, objective=objective)
    one, eight = (next(rollouts_of(run, sizes)[0]) for sizes in (ONE, ONE | {"data": 4, "tensor": 2}))
    np.testing.assert_array_equal(one.tokens_BT, eight.tokens_BT)
    for name, column in one.extra.items():
        np.testing.assert_allclose(column, eight.extra[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tune", [Full(), LoRA(rank=2, targets=("*",))], ids=["full", "lora"])
def test_a_run_starts_at_its_reference_and_leaves_it(
    tune: Any, learned: tuple[Run, float], prompts: Path, tmp_path: Path
) -> None:
    """What a run starts from is what it is to stay close to; with an adapter no second copy of it is held."""
    objective = GRPO(rewards=(has_vowels,), group=8, max_new_tokens=2, kl=0.1, temperature=1.2)
    base = str(learned[0].folder)
    run = grpo_run(prompts, tmp_path, steps=3, objective=objective, tune=tune, init_from=base)
    train(run, progress=False)
    seen = records(run.folder, "reward")
    assert [r["kl"] < 1e-6 for r in seen] == [True, False, False]
    assert all(r["logprob_gap"] < 1e-4 for r in seen)
    assert seen[0]["reward"] < 0.1  # the base answers b


def test_a_run_cut_off_between_the_updates_of_a_rollout_goes_on_bitwise_equal(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(
        rewards=(has_vowels,), group=4, max_new_tokens=6, updates=3, top_k=40, redraws=2, eval_samples=2
    )
    train_ = Train(steps=8, batch_size=16, accumulate=2, log_every=1, eval_every=4, save_every=4)
    both = {"objective": objective, "train": train_}
    whole = grpo_run(prompts, tmp_path / "whole", **both)
    assert train(whole, progress=False).reason == "finished"
    cut = grpo_run(prompts, tmp_path / "cut", **both)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        assert train(cut, progress=False).reason == "SIGTERM"
    held = restore(cut.folder, ONE)[1]["data"]["rollout"]
    assert held["left"] in (1, 2)
    assert train(cut, progress=False).reason == "finished"
    assert_same(restore(cut.folder, ONE)[0], restore(whole.folder, ONE)[0])

    def measured(run: Run) -> list[Any]:
        clock = ("seconds", "per_second", "mfu", "wait")
        found = records(run.folder, "reward") + records(run.folder, "val_reward")
        return [{k: v for k, v in r.items() if not any(c in k for c in clock)} for r in found]

    assert measured(cut) == measured(whole)
    assert len(measured(whole)) == 10


def test_groups_without_signal_are_drawn_again(prompts: Path, tmp_path: Path) -> None:
    """Only prompts of even number earn different rewards."""
    objective = GRPO(rewards=(even_only,), group=4, max_new_tokens=4, redraws=5)
    made, _ = rollouts_of(grpo_run(prompts, tmp_path, objective=objective))
    batch = next(made)
    texts = [ByteTokenizer().decode(row.tolist()) for row in batch.tokens_BT]
    assert all(int(text.split("say ")[1].split()[0].rstrip("<")[0]) >= 0 for text in texts)
    assert np.ptp(batch.extra["advantage"].reshape(-1, 4), axis=1).min() > 0
    assert 0 < made.progress(1)["no_signal"] < 1
    first = made.get_state()["row"]
    assert first > 8  # more prompts than the batch holds
    assert "rollout" not in made.get_state()


def even_only(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return (hash(completion) % 1000) * (int(prompt.split()[1]) % 2 == 0)


def test_advantages_are_deviations_from_the_groups_mean() -> None:
    rewards_B = np.array([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(advantages(rewards_B, 4, False), [0, -1, -1, 2, 0, 0, 0, 0])
    deviation = math.sqrt((0 + 1 + 1 + 4) / 3)
    scaled = np.array([0, -1, -1, 2, 0, 0, 0, 0]) / deviation
    np.testing.assert_allclose(advantages(rewards_B, 4, True), scaled, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises, "raised ZeroDivisionError: division by zero for the prompt at"),
        (not_a_number, "returned nan for the prompt at"),
        (a_word, "returned 'good' for the prompt at"),
    ],
)
def test_a_reward_that_is_none_is_one_sentence(
    function: Any, words: str, prompts: Path, tmp_path: Path
) -> None:
    run = grpo_run(prompts, tmp_path, objective=GRPO(rewards=(function,), group=8, max_new_tokens=1))
    made, _ = rollouts_of(run)
    with pytest.raises(UserError) as error:
        next(made)
    assert words in str(error.value) and f"{function.__name__}() of {__file__}" in str(error.value)
    assert "a.jsonl:" in str(error.value) and "number" in str(error.value)


def test_the_record_reaches_the_reward_and_several_rewards_add_up(prompts: Path, tmp_path: Path) -> None:
    objective = GRPO(rewards=(as_asked, has_vowels), reward_weights=(2.0, 0.5), group=2, max_new_tokens=4)
    made, _ = rollouts_of(grpo_run(prompts, tmp_path, objective=objective))
    prompt = made.rows.prompt(0)
    assert made.rewards([prompt] * 3, ["b", "be", "no"]).tolist() == [2.0, 2.5, 0.5]
