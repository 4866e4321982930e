"""Does the recipe reproduce GPT-2 124M on web text at half a million tokens per step?

OpenWebText or FineWeb-Edu from local files (JSONL, Parquet or text; globs allowed):

    jaxgpt tokenizer train 'fineweb-edu/*.parquet' --out tokenizers/web50k --vocab-size 50257
    jaxgpt data prepare 'fineweb-edu/*.parquet' --out data/web --tokenizer tokenizers/web50k \\
        --validation 0.001
    jaxgpt train configs/gpt2_124m.py --mesh.data 8

480 rows of 1,024 tokens per step (0.49M), 19,073 steps: about 9.4 billion tokens. Expected: a validation
loss near 3.3 nats per token with a vocabulary of this size (GPT-2's own is 3.12 on OpenWebText after
far more tokens). We have not yet run it to the end: no accelerator was available.
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="gpt2_124m",
        model=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768),
        data=Text(path="data/web", workers=2),
        optim=Optim(peak_lr=6e-4, final_lr=6e-5, warmup_steps=700, weight_decay=0.1),
        train=Train(
            steps=19_073,
            batch_size=480,
            accumulate=5,
            eval_every=250,
            eval_batches=20,
            save_every=1000,
        ),
        compute=Compute(dtype="bfloat16"),
    )
