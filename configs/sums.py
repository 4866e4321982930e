"""How many sums of two numbers below a hundred does a small model get right after half a minute of imitation?

    mkdir -p data
    python -c "for i in range(10_000): a, b = divmod(i, 100); print('{\"prompt\": \"%d+%d=\", ' \\
        '\"answer\": \"%d\"}' % (a, b, a + b))" > data/sums.jsonl
    jaxgpt train configs/sums.py

Expected: 83 % of held-out sums by greedy decoding, but 31 % at temperature 1; half a minute on two cores.
"""

from jaxgpt.config import GPT, Chat, Compute, Optim, Run, Train


def model() -> GPT:
    return GPT(vocab_size=264, context=128, layers=3, heads=4, width=96, position="rope", norm="rmsnorm")


def config() -> Run:
    return Run(
        name="sums",
        model=model(),
        data=Chat(
            train=("data/sums.jsonl",),
            tokenizer="byte",
            prompt="prompt",
            completion="answer",
            template="none",
        ),
        optim=Optim(name="muon", muon_lr=0.01, peak_lr=3e-3, final_lr=3e-4, warmup_steps=20),
        train=Train(steps=200, batch_size=16, eval_every=100, save_every=200),
        compute=Compute(dtype="float32"),
    )
