"""How fast and how well does the common small benchmark setting train on a CPU?

Four layers with hidden size 128 on bytes (in this file a byte is a character), context 64, batch size 12.

    jaxgpt data prepare tinyshakespeare.txt --out data/shakespeare --tokenizer byte \\
        --validation 0.1 --split tail
    jaxgpt train configs/shakespeare_char.py

Expected: a validation loss of 1.875 nats over the whole validation split after 2,000 steps (1.85 on the 20
batches that the loop evaluates), in about 75 to 100 seconds on two cores (benchmarks/results). b2 and
warm-up were chosen by that loss; with the usual 0.99 and 100 steps it is 1.887.
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="shakespeare_char",
        model=GPT(vocab_size=264, context=64, layers=4, heads=4, width=128, bias=False),
        data=Text(path="data/shakespeare"),
        optim=Optim(peak_lr=1e-3, final_lr=1e-4, b2=0.995, warmup_steps=200),
        train=Train(steps=2000, batch_size=12, eval_every=250, eval_batches=20, save_every=1000, seed=1337),
        compute=Compute(dtype="float32"),
    )
