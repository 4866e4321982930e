"""What does instruction tuning, with the loss only on the answers, add to a pretrained GPT-2 124M?

Three epochs of Alpaca's `instruction/input/output` records, starting from the best checkpoint of
`gpt2_124m`.

    jaxgpt data show configs/instruct_alpaca.py     # look at the loss mask first
    jaxgpt train configs/instruct_alpaca.py
    jaxgpt chat runs/instruct_alpaca

Expected: the validation loss on answers falls within the first epoch and begins to rise in the
third; the best checkpoint is kept and training stops early.
"""

from jaxgpt.config import GPT, Chat, Compute, Optim, Run, Train


def config() -> Run:
    return Run(
        name="instruct_alpaca",
        init_from="runs/gpt2_124m",
        model=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768, dropout=0.1),
        data=Chat(train=("data/alpaca/*.json",), validation_fraction=0.03, length=1024),
        optim=Optim(peak_lr=5e-5, final_lr=0.0, schedule="linear", warmup_steps=30, weight_decay=0.0),
        train=Train(steps=600, batch_size=32, eval_every=50, save_every=200, patience=4, log_every=5),
        compute=Compute(dtype="bfloat16"),
    )
