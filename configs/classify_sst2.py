"""How well does a small encoder, trained from scratch, classify the sentiment of film reviews?

SST-2 (Socher et al. 2013): each line is a sentence, a tab, and 0 or 1. `train.txt` has only the sentences
(`cut -f1 train.tsv > train.txt`).

    jaxgpt tokenizer train data/sst2/train.txt --out tokenizers/sst2 --vocab-size 4096
    jaxgpt train configs/classify_sst2.py
    jaxgpt eval runs/classify_sst2 --split test
    jaxgpt monitor runs/classify_sst2 reviews.txt --label 0    # docs/monitoring.md

Expected: an accuracy of 0.80 on the test file.
"""

from jaxgpt.config import GPT, Classification, Classifier, Compute, Labelled, Optim, Run, Train


def config() -> Run:
    return Run(
        name="classify_sst2",
        model=Classifier(
            backbone=GPT(
                vocab_size=4096,
                context=128,
                layers=2,
                width=128,
                heads=4,
                position="rope",
                norm="rmsnorm",
                bias=False,
                dropout=0.3,
                causal=False,
            ),
            labels=("0", "1"),
            pool="mean",
            head_dropout=0.3,
        ),
        data=Labelled(
            train=("data/sst2/train.tsv",),
            validation=("data/sst2/dev.tsv",),
            test=("data/sst2/test.tsv",),
            tokenizer="tokenizers/sst2",
        ),
        objective=Classification(),
        optim=Optim(peak_lr=1e-3, final_lr=1e-5, warmup_steps=40, weight_decay=0.1),
        train=Train(steps=400, batch_size=16, eval_every=50, save_every=400, best_by="error"),
        compute=Compute(dtype="float32"),
    )
