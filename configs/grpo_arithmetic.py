"""Do rewards alone finish what half a minute of imitation began: sums of two numbers below a hundred?

The data and the model that it starts from are those of `configs/sums.py`. An answer earns 1 if it is right:

    jaxgpt train configs/grpo_arithmetic.py

Expected: little, and slowly: 83.4 % of held-out sums before, 85.8 % after 50 steps, half a minute on two
cores.
Higher rates lose more than they win (benchmarks/results/grpo_2026-11-26.md).
"""

from typing import Any

from jaxgpt.config import GPT, GRPO, Compute, Optim, Prompts, Run, Train


def right(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 for the sum, to the letter."""
    return float(completion == record["answer"])


def config() -> Run:
    return Run(
        name="grpo_arithmetic",
        init_from="runs/sums",
        model=GPT(vocab_size=264, context=128, layers=3, heads=4, width=96, position="rope", norm="rmsnorm"),
        data=Prompts(train=("data/sums.jsonl",), template="none", length=12),
        objective=GRPO(rewards=(right,), group=16, max_new_tokens=4),
        optim=Optim(peak_lr=3e-5, final_lr=3e-5, schedule="constant", warmup_steps=10, weight_decay=0.0),
        train=Train(steps=50, batch_size=1024, log_every=1, eval_every=25, save_every=50),
        compute=Compute(dtype="float32"),
    )
