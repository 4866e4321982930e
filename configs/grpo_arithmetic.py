"""Can a model that has never read a text learn short sums from rewards alone?

The prompts are the sums of two digits, `3+4=`; an answer earns more the nearer it is to the right one:

    mkdir -p data
    python -c "for i in range(100): a, b = divmod(i, 10); print('{\"prompt\": \"%d+%d=\", \"sum\": %d}' \\
        % (a, b, a + b))" > data/sums.jsonl
    jaxgpt train configs/grpo_arithmetic.py

Expected: TODO
"""

from typing import Any

from jaxgpt.config import GPT, GRPO, Compute, Optim, Prompts, Run, Train


def near(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 for the sum; less for another number, the farther away; 0 for no number."""
    text = completion.strip()
    if not (text.isascii() and text.isdigit()):
        return 0.0
    return 1.0 if int(text) == record["sum"] else 0.5 / (1 + abs(int(text) - record["sum"]))


def config() -> Run:
    return Run(
        name="grpo_arithmetic",
        model=GPT(vocab_size=264, context=16, layers=2, heads=4, width=64),
        data=Prompts(
            train=("data/sums.jsonl",),
            validation=("data/sums.jsonl",),
            tokenizer="byte",
            template="none",
        ),
        objective=GRPO(rewards=(near,), group=16, max_new_tokens=3, per="token", scale=False, clip_high=0.28),
        optim=Optim(peak_lr=1e-3, final_lr=1e-3, schedule="constant", warmup_steps=10, weight_decay=0.0),
        train=Train(steps=600, batch_size=512, log_every=10, eval_every=100, save_every=600),
        compute=Compute(dtype="float32"),
    )
