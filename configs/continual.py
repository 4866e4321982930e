"""Do replay and penalties keep what a model knew while it learns a second corpus?

A base learns one corpus, and then another: as it is, with a tenth of its rows from the first one, with L2-SP,
with EWC, and with replay and EWC.

    jaxgpt data prepare 'prose/*.txt' --out data/prose --tokenizer byte --validation 0.05
    jaxgpt data prepare 'code/*.py.txt' --out data/code --tokenizer byte --validation 0.05
    jaxgpt train configs/continual.py
    jaxgpt sweep configs/continual.py
    jaxgpt eval runs/continual/ewc --forgetting runs/first

Expected: as it is, the second run forgets most; replay forgets least at little cost on the new corpus;
penalties lie between, EWC before L2-SP.
"""

from collections.abc import Iterator
from dataclasses import replace

from jaxgpt.config import EWC, GPT, L2SP, Optim, Replay, Run, Text, Train

FIRST, SECOND = Text(path="data/prose"), Text(path="data/code")


def config() -> Run:
    return Run(
        name="first",
        model=GPT(vocab_size=264, context=256, layers=6, width=256, heads=4, position="rope", norm="rmsnorm"),
        data=FIRST,
        optim=Optim(peak_lr=1e-3, warmup_steps=100),
        train=Train(steps=1000, batch_size=32, eval_every=200),
    )


def sweep() -> Iterator[tuple[str, Run]]:
    first, replay, ewc = config(), Replay(data=FIRST, share=0.1), (EWC(weight=100.0),)
    gentle = Optim(peak_lr=3e-4, final_lr=3e-5, warmup_steps=50, weight_decay=0.0)
    second = replace(first, data=SECOND, init_from="runs/first", optim=gentle)
    yield "plain", second
    yield "replay", replace(second, replay=replay)
    yield "l2sp", replace(second, measures=(L2SP(weight=0.01),))
    yield "ewc", replace(second, measures=ewc)
    yield "replay-ewc", replace(second, replay=replay, measures=ewc)
