"""What does a memory of the 64 tokens before a row bring in the small setting that everyone compares?

`configs/shakespeare_char.py` with relative positions and a memory: four layers of width 128 on bytes,
rows of 64, batch 12, the same optimizer, data and number of steps. The MLP is narrower, so that the
sinusoids' projections fit: 825,352 parameters against 829,568.

    jaxgpt data prepare tinyshakespeare.txt --out data/shakespeare --tokenizer byte \\
        --validation 0.1 --split tail
    jaxgpt train configs/transformer_xl_shakespeare.py

Expected: 2.511 bits a byte (1.741 nats) of the whole held-out tail with its memory of 64, against 2.705
(1.875 nats) of shakespeare_char; a longer memory in evaluation brings no more (benchmarks/results).
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
