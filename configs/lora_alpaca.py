"""How much of instruction tuning can 1 % of the parameters do?

LoRA in place of the full tuning of `instruct_alpaca`: 1.3 million trained parameters of 124, A and B of rank
8 beside every linear layer of the blocks.

    jaxgpt train configs/lora_alpaca.py
    jaxgpt chat runs/lora_alpaca

Variants: `--tune.base nf4` holds the frozen weights in 4 bits (QLoRA), `--tune.rank 64`; another method is a
change of `tune` in this file (docs/tuning.md).

Expected: the validation loss on answers falls in the first epoch as with `instruct_alpaca`, and stays within
a few hundredths of it; a checkpoint takes 16 MB, optimizer included, in place of 1.5 GB.
"""

from jaxgpt.config import GPT, Chat, Compute, LoRA, Optim, Run, Train


def config() -> Run:
    return Run(
        name="lora_alpaca",
        init_from="runs/gpt2_124m",
        tune=LoRA(rank=8, alpha=16.0, dropout=0.05),
        model=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768),
        data=Chat(train=("data/alpaca/*.json",), validation_fraction=0.03, length=1024),
        optim=Optim(peak_lr=3e-4, final_lr=0.0, schedule="linear", warmup_steps=30, weight_decay=0.0),
        train=Train(steps=600, batch_size=32, eval_every=50, save_every=200, patience=4, log_every=5),
        compute=Compute(dtype="bfloat16"),
    )
