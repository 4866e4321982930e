"""What does a small encoder learn from Chinese text with some of its characters masked?

    jaxgpt tokenizer train 'data/zh_text/*.txt' --out tokenizers/zh_char --vocab-size 3200 --model-type char
    jaxgpt data prepare 'data/zh_text/*.txt' --out data/zh --tokenizer tokenizers/zh_char --split tail
    jaxgpt train configs/mlm_zh.py

Any Chinese text will do. benchmarks/ner.py uses a novel and the training sentences of the resumes, and makes
the backbone of configs/ner_resume.py.

Expected: a validation loss of 3.19 on the masked characters, for the text of benchmarks/ner.py.
"""

from jaxgpt.config import GPT, Compute, MaskedLM, Optim, Run, Text, Train

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
        name="mlm_zh",
        model=ENCODER,
        data=Text(path="data/zh"),
        objective=MaskedLM(),
        optim=Optim(peak_lr=1.5e-3, final_lr=1.5e-5, warmup_steps=200, weight_decay=0.05, b2=0.98),
        train=Train(steps=2000, batch_size=24, eval_every=250, eval_batches=10, save_every=250),
        compute=Compute(dtype="float32"),
    )
