"""Does reward alone make the quick start's chat model surer of a skill that it half knows?

It goes on with a series of numbers ("Continue counting: 5, 10, 15, 20"), but at temperature 1 one answer in
five is wrong. Here it answers each question eight times, and the right answers become more likely:

    jaxgpt quickstart --workdir quickstart
    jaxgpt train configs/grpo_skills.py

Expected: the mean reward of rollouts from 0.80 to 0.89, that of greedy answers to held-out prompts from 0.98
to between 0.98 and 1.00, in 60 steps, two minutes on two cores (benchmarks/results/grpo_2026-11-26.md).
"""

from pathlib import Path
from typing import Any

from jaxgpt.config import GRPO, Compute, Optim, Prompts, Run, Train
from jaxgpt.quickstart import model

WORK = Path("quickstart")


def exact(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 for the answer that the record ends with, but for spaces around it."""
    return float(completion.strip() == record["messages"][-1]["content"].strip())


def config() -> Run:
    instructions = str(WORK / "instructions/train.jsonl")
    return Run(
        name="grpo_skills",
        init_from=str(WORK / "runs/tune"),
        model=model(),
        data=Prompts(train=(instructions,), where="skill=next_number", length=48),
        objective=GRPO(rewards=(exact,), group=8, max_new_tokens=8),
        # The signal fades as answers get right, and Adam's steps do not: so the rate falls.
        optim=Optim(
            peak_lr=1e-4, final_lr=1e-6, schedule="linear", warmup_steps=5, b2=0.99, weight_decay=0.0
        ),
        train=Train(steps=60, batch_size=128, log_every=1, eval_every=20, save_every=60),
        compute=Compute(dtype="float32"),
    )
