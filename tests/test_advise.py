"""Advice on synthetic curves: each fault is named with its numbers, and a healthy run is left alone."""

import math
from dataclasses import replace

import pytest

from jaxgpt.advise import advice_on, advise
from jaxgpt.config import GPT, Optim, Run, Train, to_json
from jaxgpt.errors import UserError
from jaxgpt.files import write_json, write_jsonl

RUN = Run(
    name="r",
    model=GPT(vocab_size=264, context=32, layers=1, width=16, heads=2),
    optim=Optim(peak_lr=1e-3, warmup_steps=10),
    train=Train(steps=1000, batch_size=32, eval_batches=4),
)


def curve(change=lambda step, record: {}, evaluation=lambda step, loss: loss + 0.1):
    """A loss that falls towards 2, flat at the end, with a cosine; `change` alters records."""
    made = []
    for step in range(10, 1001, 10):
        loss = 2 + 3 * math.exp(-step / 80)
        rate = 1e-3 * (1 + math.cos(math.pi * step / 1000)) / 2
        record = {
            "step": step, "loss": loss, "learning_rate": rate, "skipped": 0, "data_wait": 0.01,
            "tokens_per_second": 1000.0, "grad_norm": 0.5,
        }  # fmt: skip
        made.append(record | change(step, record))
        if step % 100 == 0:
            made.append({"step": step, "val_loss": evaluation(step, made[-1]["loss"])})
    return made


def found(records, run=RUN):
    return {advice.about: advice for advice in advice_on(run, records)}


def test_a_healthy_run_is_left_alone():
    advice = found(curve())
    assert {name for name, one in advice.items() if one.attempt} == set()
    assert "not measured" in advice["batch size"].finding


CASES = {
    "skipped updates": ({"skipped": lambda step: 3 if step > 500 else 0}, "3 of 1000"),
    "divergence": ({"loss": lambda step: 2 + abs(step - 500) / 500}, "step 1000"),
    "loss spikes": ({"loss": lambda step: 9 if step in (400, 700) else 2.5}, "2 times, to 9"),
    "too few steps": ({"loss": lambda step: 5 - step / 400}, "still fell by"),
    "input": ({"data_wait": lambda step: 0.4}, "40% of a step"),
    "speed": ({"tokens_per_second": lambda step: 1000 if step < 500 else 600}, "600 tokens per second"),
}


@pytest.mark.parametrize("about", CASES)
def test_each_fault_is_named_with_its_numbers(about):
    parts, number = CASES[about]
    advice = found(curve(lambda step, record: {name: part(step) for name, part in parts.items()}))
    assert number in advice[about].finding and advice[about].attempt
    assert {n for n, one in advice.items() if one.attempt} == {about}


def test_a_rate_that_never_falls_ends_on_a_plateau():
    records = curve(lambda step, record: {"learning_rate": 1e-3})
    run = replace(RUN, optim=replace(RUN.optim, schedule="constant"))
    assert "100% of its peak" in found(records, run)["plateau"].finding
    assert "plateau" not in found(records)  # that of a cosine falls by itself


def test_overfitting_names_where_it_began_and_what_is_not_on_yet():
    records = curve(
        lambda step, record: {"loss": 3 * math.exp(-step / 400)},
        lambda step, loss: 2 + (step - 300) ** 2 / 1e6,
    )
    advice = found(records)["overfitting"]
    assert "at step 300" in advice.finding and "2.49" in advice.finding
    assert "train.patience" in advice.attempt and "none" in advice.attempt
    patient = found(records, replace(RUN, train=replace(RUN.train, patience=2)))["overfitting"]
    assert "train.patience" not in patient.attempt


def test_an_evaluation_that_is_mostly_chance():
    records = curve(evaluation=lambda step, loss: 2.1 + 0.05 * (step // 100 % 2))
    assert "train.eval_batches (4)" in found(records)["evaluation"].attempt
    whole = replace(RUN, train=replace(RUN.train, eval_batches=0))
    assert "evaluation" not in found(records, whole)


@pytest.mark.parametrize(("scale", "words"), [(1000, "larger"), (4, "smaller"), (40, "")])
def test_the_batch_against_the_noise_scale(scale, words):
    advice = found(curve(lambda step, record: {"noise_scale": scale * (1 + step % 20 / 100)}))["batch size"]
    assert words in advice.attempt and bool(advice.attempt) == bool(words)
    assert "32" in advice.finding


def test_the_command(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"run": to_json(RUN)})
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        advise(str(tmp_path))
    write_jsonl(tmp_path / "metrics.jsonl", curve())
    advise(str(tmp_path))
    assert "Nothing in the curves asks for a change" in capsys.readouterr().out
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, "event": "compiled"}])
    with pytest.raises(UserError, match="no training loss"):
        advise(str(tmp_path))
