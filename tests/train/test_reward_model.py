"""A reward model learns which of two answers is better, and chooses the best of several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from families import native_run
from tiny import FLOAT32, HERE
from tiny_runs import records

from jaxgpt.api import Model, load
from jaxgpt.config import (
    DPO,
    GPT,
    GRPO,
    Bert,
    BradleyTerry,
    Chat,
    Classification,
    Mesh,
    Optim,
    Pairs,
    RewardModel,
    Run,
    Train,
)
from jaxgpt.data.readers.prompts import Prompt
from jaxgpt.errors import UserError
from jaxgpt.evals.loss import loss_of
from jaxgpt.models import init_params, parameter_counts
from jaxgpt.sample.commands import sample
from jaxgpt.sample.judge import Judge
from jaxgpt.sample.load import load_trained
from jaxgpt.sample.settings import Way
from jaxgpt.train.loop import train
from jaxgpt.train.rewards import Rewards

BACKBONE = GPT(vocab_size=264, context=64, layers=1, width=32, heads=4)


def talk(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def write(path: Path, numbers: range) -> tuple[str]:
    """The better side has a `y` in it, at the beginning, so that the last token must have read it."""
    lines = [{"prompt": f"{i}", "chosen": f"y{i % 7} {i}", "rejected": f"n{i % 7} {i}"} for i in numbers]
    path.write_text("\n".join(map(json.dumps, lines)))
    return (str(path),)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rewards")
    native_run(folder / "base", BACKBONE, data=Chat(train=("x",)))
    data = Pairs(
        train=write(folder / "a.jsonl", range(40)), validation=write(folder / "b.jsonl", range(50, 60))
    )
    return Run(
        name="reward", runs=str(folder), init_from=str(folder / "base"), model=RewardModel(),
        data=replace(data, length=64), objective=BradleyTerry(center=0.01),
        compute=replace(FLOAT32, unroll=1), mesh=Mesh(data=1, fsdp=8),
        optim=Optim(peak_lr=3e-3, final_lr=3e-4, warmup_steps=0),
        train=Train(steps=30, batch_size=8, log_every=1, eval_every=15, save_every=30, best_by="error"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def judge(run: Run) -> Model:
    train(run, progress=False)
    return load(run.folder, checkpoint="newest")


def test_what_separates_the_sides_is_learned(judge, run) -> None:
    first, last = records(run.folder)[0], records(run.folder, "val_loss")[-1]
    assert first["loss"] > 0.3
    assert last["val_accuracy"] == 1.0 and last["val_margin"] > 1
    found = loss_of(load_trained(run.folder, which="newest"), batch_size=8)
    assert found["margin"] == pytest.approx(last["val_margin"], rel=1e-4)


def test_rewards_of_dialogues(judge, run) -> None:
    """Those of evaluation, the same alone and in company."""
    pairs = [(talk(f"{i}", f"y{i % 7} {i}"), talk(f"{i}", f"n{i % 7} {i}")) for i in range(50, 60)]
    found = judge.rewards([side for pair in pairs for side in pair]).reshape(10, 2)
    last = records(run.folder, "val_loss")[-1]
    np.testing.assert_allclose(
        found.mean(0), [last["val_reward_chosen"], last["val_reward_rejected"]], rtol=1e-4
    )
    alone = [judge.rewards([side])[0] for side in pairs[0]]
    np.testing.assert_allclose(alone, found[0], rtol=1e-4)
    assert judge.rewards([]).shape == (0,)
    with pytest.raises(UserError, match="dialogue 1 does not end with an assistant's turn"):
        judge.rewards([pairs[0][0], pairs[0][0][:1]])
    with pytest.raises(UserError, match=r"dialogue 0 has \d+ tokens but the reward model's context is 64"):
        judge.rewards([talk("a" * 80, "b")])
    with pytest.raises(UserError, match=r"a RewardModel, which has no way to generate .*use rewards\(\)"):
        judge.generate("a")


def test_the_best_of_several_is_shown(judge, run, capsys) -> None:
    """Of the completions that `--n` would show, one of the highest reward."""
    base, asked = str(Path(run.runs) / "base"), ("12", "13")
    common = {"prompt": asked, "max_new_tokens": 4, "json": True}
    sample(base, n=3, **common)
    every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sample(base, way=Way(best_of=3, reward=str(run.folder)), **common)
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    judge = Judge.load(run.folder)
    for i, (prompt, one) in enumerate(zip(asked, best, strict=True)):
        rewards = judge([talk(prompt, other["text"]) for other in every[3 * i : 3 * i + 3]])
        assert one["text"] == every[3 * i + int(np.argmax(rewards))]["text"]
        assert one["score"] == pytest.approx(float(rewards.max()), rel=1e-4)
    sample(base, way=Way(best_of=3), n=3, **common)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for i in range(len(asked)):
        scored = {line["text"]: line["score"] for line in lines[3 * i : 3 * i + 3]}
        means = {o["text"]: np.mean(o["logprobs"]) for o in every[3 * i : 3 * i + 3]}
        assert scored == pytest.approx(means, rel=1e-5)
        assert [*scored.values()] == sorted(scored.values(), reverse=True)
    with pytest.raises(UserError, match="--reward is given without --best-of; add that"):
        Way(reward=base)
    with pytest.raises(UserError, match="holds a GPT, which gives no rewards; name a run of a RewardModel"):
        sample(base, way=Way(best_of=3, reward=base), prompt=asked)


def test_a_head_of_one_output_on_any_backbone() -> None:
    for backbone in (BACKBONE, Bert(vocab_size=264, context=64, layers=1, width=32, heads=4)):
        own, whole = (parameter_counts(one)["total"] for one in (backbone, RewardModel(backbone=backbone)))
        assert whole == own + 32
        params = jax.eval_shape(
            lambda b=backbone: init_params(RewardModel(backbone=b), FLOAT32, HERE, jax.random.key(0))
        )
        assert params["head"]["weight"].shape == (1, 32)


def test_what_does_not_belong_together_is_refused(run) -> None:
    for change, words in (
        ({"objective": DPO()}, r"objective is DPO\(\) and model RewardModel"),
        ({"model": BACKBONE}, r"objective is BradleyTerry\(\) and model GPT"),
        ({"data": Chat(train=("x",))}, r"data is Chat but objective BradleyTerry\(\) .* set data to Pairs"),
        ({"objective": Classification()}, "Classification"),
    ):
        with pytest.raises(UserError, match=words):
            replace(run, **change)


def test_it_rewards_completions_in_reinforcement_learning(judge, run) -> None:
    """With its weight, beside the dialogue that the prompt is the end of."""
    asked = [[{"role": "user", "content": text}] for text in ("12", "13")]
    prompts = [Prompt("a:1", [], turns, turns[-1]["content"], {}) for turns in asked]
    rewards = Rewards.of(GRPO(rewards=(str(run.folder),), reward_weights=(0.5,)))
    own = Judge.load(run.folder)([talk("12", "y5 12"), talk("13", "n6 13")])
    np.testing.assert_allclose(rewards(prompts, ["y5 12", "n6 13"]), 0.5 * own, rtol=1e-5)
    with pytest.raises(UserError, match="has 'nowhere'; write a function as FILE"):
        Rewards.of(GRPO(rewards=("nowhere",)))
