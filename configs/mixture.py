"""Does a model learn two corpora at once, three parts of one to one part of the other?

    jaxgpt data prepare 'prose/*.txt' --out data/prose --tokenizer byte --validation 0.05
    jaxgpt data prepare 'code/*.py.txt' --out data/code --tokenizer byte --validation 0.05
    jaxgpt train configs/mixture.py

Expected: a validation loss for each source (`val_loss/prose`, `val_loss/code`) beside that of all, and the
tokens read of each in every log record. `--data.weights 1 1` changes the shares; without weights, they are
those of the sizes, evened out by `temperature`. Sources may be `Chat` too: text mixed into instruction tuning
keeps what was learned from text.
"""

from jaxgpt.config import GPT, Mix, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="mixture",
        model=GPT(vocab_size=264, context=256, layers=6, width=256, heads=4, position="rope", norm="rmsnorm"),
        data=Mix(sources=(Text(path="data/prose"), Text(path="data/code")), weights=(3.0, 1.0)),
        optim=Optim(peak_lr=1e-3, warmup_steps=100),
        train=Train(epochs=2, batch_size=32, eval_every=200, samples=4),
    )
