"""What does a memory of the 64 tokens before a row gain in the common small benchmark setting?

`configs/shakespeare_char.py` with relative positions and a memory: four layers with hidden size 128 on bytes,
rows of 64, batch size 12, the same optimizer, data and number of steps. The MLP is narrower to make room for
the projections of the sinusoids: 825,352 parameters against 829,568.

    jaxgpt data prepare tinyshakespeare.txt --out data/shakespeare --tokenizer byte \\
        --validation 0.1 --split tail
    jaxgpt train configs/transformer_xl_shakespeare.py

Expected: 2.511 bits per byte (1.741 nats) over the whole validation split with its memory of 64, against
2.705 (1.875 nats) for shakespeare_char; a longer memory in evaluation gains nothing (benchmarks/results).
"""

from jaxgpt.config import Compute, Optim, Run, Text, Train, TransformerXL


def config() -> Run:
    return Run(
        name="transformer_xl_shakespeare",
        model=TransformerXL(
            vocab_size=264,
            context=1024,
            segment=64,
            memory=64,
            layers=4,
            heads=4,
            width=128,
            mlp_width=448,
            mlp="gelu",
            norm_at="pre",
            shared_biases=True,
            dropout=0.0,
        ),
        data=Text(path="data/shakespeare", contiguous=True),
        optim=Optim(peak_lr=1e-3, final_lr=1e-4, b2=0.995, warmup_steps=200),
        train=Train(steps=2000, batch_size=12, eval_every=250, eval_batches=20, save_every=1000, seed=1337),
        compute=Compute(dtype="float32"),
    )
