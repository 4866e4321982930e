"""Does reward alone teach the quick start's chat model the skill that it is worst at?

It answers 29 % of the questions to leave a word out of a list ("Leave data out: new, data, where"). Here it
answers each question eight times, and the answers that are right to the letter become more likely:

    jaxgpt quickstart --workdir quickstart
    jaxgpt train configs/grpo_skills.py

Expected: mean reward on held-out prompts from 0.4 to above 0.9 in 100 steps, about two minutes on two CPU
cores (benchmarks/results).
"""

from pathlib import Path
from typing import Any

from jaxgpt.config import GRPO, Compute, Optim, Prompts, Run, Train
from jaxgpt.quickstart import model

WORK = Path("quickstart")


def exact(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 for the answer that the record ends with, spaces around it aside."""
    return float(completion.strip() == record["messages"][-1]["content"].strip())


def config() -> Run:
    return Run(
        name="grpo_skills",
        init_from=str(WORK / "runs/tune"),
        model=model(),
        data=Prompts(train=(str(WORK / "instructions/train.jsonl"),), where="skill=remove_word", length=64),
        objective=GRPO(rewards=(exact,), group=8, max_new_tokens=24),
        optim=Optim(peak_lr=2e-4, final_lr=2e-4, schedule="constant", warmup_steps=5, weight_decay=0.0),
        train=Train(steps=100, batch_size=128, log_every=1, eval_every=25, save_every=100),
        compute=Compute(dtype="float32"),
    )
