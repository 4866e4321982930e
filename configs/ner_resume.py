"""How well does a small encoder tag named entities in Chinese resumes, from scratch and pretrained?

    jaxgpt train configs/ner_resume.py
    jaxgpt eval runs/ner_resume --split test
    jaxgpt train configs/ner_resume.py --name ner_resume_tuned --init-from runs/mlm_zh

The data are the BMES files of Zhang & Yang (2018) in data/resume: every character is a word. The character
tokenizer and the backbone come from configs/mlm_zh.py. benchmarks/ner.py runs all of it.

Expected: a strict F1 on the test file of 0.90 from scratch and 0.916 from the backbone (a BiLSTM-CRF on
characters: about 0.94).
"""

from jaxgpt.config import GPT, Classification, Classifier, Compute, Optim, Run, Tagged, Train

TYPES = ("CONT", "EDU", "LOC", "NAME", "ORG", "PRO", "RACE", "TITLE")
LABELS = ("O", *(f"{place}-{kind}" for place in "BI" for kind in TYPES))

ENCODER = GPT(
    vocab_size=3200,
    context=192,
    layers=3,
    width=128,
    heads=4,
    position="rope",
    norm="rmsnorm",
    bias=False,
    dropout=0.1,
    causal=False,
)
"""Bidirectional, with norms on the branches: BERT's norms after the sums stayed on a plateau at this size."""


def config() -> Run:
    return Run(
        name="ner_resume",
        model=Classifier(
            backbone=ENCODER,
            labels=LABELS,
            head_dropout=0.2,
        ),
        data=Tagged(
            train=("data/resume/train.char.bmes",),
            validation=("data/resume/dev.char.bmes",),
            test=("data/resume/test.char.bmes",),
            tokenizer="tokenizers/zh_char",
            joiner="",
        ),
        objective=Classification(),
        optim=Optim(peak_lr=1e-3, final_lr=1e-5, warmup_steps=150, weight_decay=0.05, b2=0.98),
        train=Train(steps=1500, batch_size=12, eval_every=100, save_every=500, best_by="error"),
        compute=Compute(dtype="float32"),
    )
