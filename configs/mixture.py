"""Does a model learn two corpora at once, three parts of one to one part of the other?

    jaxgpt data prepare 'prose/*.txt' --out data/prose --tokenizer byte --validation 0.05
    jaxgpt data prepare 'code/*.py.txt' --out data/code --tokenizer byte --validation 0.05
    jaxgpt train configs/mixture.py

Every log record has the tokens read of each source, and every evaluation its own validation loss
(`val_loss/prose`, `val_loss/code`) beside that of all. `--data.weights 1 1` changes the shares; without weights,
`temperature` makes them of the sizes. Sources may be `Chat` too: mixing text into instruction tuning keeps what
was learned from text.
"""

from jaxgpt.config import GPT, Mix, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="mixture",
        model=GPT(vocab_size=264, context=256, layers=6, width=256, heads=4, position="rope", norm="rmsnorm"),
        data=Mix(sources=(Text(path="data/prose"), Text(path="data/code")), weights=(3.0, 1.0)),
        optim=Optim(peak_lr=1e-3, warmup_steps=100),
        train=Train(epochs=2, batch_size=32, eval_every=200),
    )
