"""How good is the baseline of the ablations in this folder, each of which varies one thing?

GPT-2's architecture with 0.8 million parameters on bytes: four layers, hidden size 128, context 128. It sees
1.0 million tokens in 500 steps, about a minute on two cores.

    jaxgpt data prepare tinyshakespeare.txt --out data/shakespeare --tokenizer byte \\
        --validation 0.1 --split tail
    jaxgpt train configs/ablations/base.py

Expected: a validation loss of 2.12 nats per byte (2.123 to 2.126 with three seeds).
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="ablation_base",
        model=GPT(vocab_size=264, context=128, layers=4, heads=4, width=128, bias=False),
        data=Text(path="data/shakespeare"),
        optim=Optim(peak_lr=2e-3, final_lr=2e-4, b2=0.99, warmup_steps=100),
        train=Train(steps=500, batch_size=16, eval_every=50, eval_batches=20, save_every=250, seed=1337),
        compute=Compute(dtype="float32"),
    )
