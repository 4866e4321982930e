"""What does one small model lose, or gain, that learns seven tasks at once instead of one?

Translation both ways (Tatoeba), restaurant descriptions (E2E NLG), sentiment (SST-2), questions on passages
in English and Chinese (XQuAD), and instructions (Alpaca), each asked in several ways, in shares that a
temperature of 2 evens out. The sweep trains each task alone for as many steps too. The tokenizer is made of
the texts of three of them:

    cat data/tatoeba_en_zh.tsv data/e2e-nlg/devset.csv data/sst2/train.tsv > data/multitask.txt
    jaxgpt tokenizer train data/multitask.txt --out tokenizers/multitask --vocab-size 8192
    jaxgpt data show configs/multitask.py
    jaxgpt train configs/multitask.py
    jaxgpt sweep configs/multitask.py

Expected: a validation loss for each task (`val_loss/en-zh`, ...) beside that of all, measured in the way to
ask that training does not use. `jaxgpt eval runs/multitask --suite FILE.py` scores the answers themselves.
"""

from collections.abc import Iterator
from dataclasses import replace

from jaxgpt.config import GPT, Compute, Mix, Optim, Run, Task, Train
from jaxgpt.tasks import DataToText, Dialogue, ExtractiveQA, TextClassification, Translation

PAIRS = {"train": ("data/tatoeba_en_zh.tsv",), "header": ("en", "zh")}
TASKS: dict[str, Task] = {
    "en-zh": Translation(**PAIRS, source="en", into="zh"),
    "zh-en": Translation(**PAIRS, source="zh", into="en"),
    "e2e": DataToText(train=("data/e2e-nlg/devset.csv",), validation=("data/e2e-nlg/testset_w_refs.csv",)),
    "sst2": TextClassification(
        train=("data/sst2/train.tsv",), validation=("data/sst2/dev.tsv",), test=("data/sst2/test.tsv",)
    ),
    "xquad-en": ExtractiveQA(train=("data/xquad.en.json",)),
    "xquad-zh": ExtractiveQA(train=("data/xquad.zh.json",), language="zh"),
    "alpaca": Dialogue(train=("data/instruct/alpaca_en_demo.json",)),
}


def mixture(names: tuple[str, ...]) -> Mix:
    """These tasks as one source of rows."""
    sources = tuple(replace(TASKS[name], tokenizer="tokenizers/multitask") for name in names)
    return Mix(sources=sources, names=names, temperature=2.0)


def config() -> Run:
    return Run(
        name="multitask",
        model=GPT(
            vocab_size=8192,
            context=512,
            layers=6,
            width=256,
            heads=4,
            position="rope",
            norm="rmsnorm",
            dropout=0.1,
        ),
        data=mixture(tuple(TASKS)),
        optim=Optim(peak_lr=1e-3, final_lr=1e-5, warmup_steps=100),
        train=Train(steps=2000, batch_size=16, eval_every=200, save_every=1000, samples=4),
        compute=Compute(dtype="float32"),
    )


def sweep() -> Iterator[tuple[str, Run]]:
    yield "all", config()
    for name in TASKS:
        yield name, replace(config(), data=mixture((name,)))
