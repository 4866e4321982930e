"""BERT-base: how well does an encoder predict masked tokens, with the paper's recipe?

12 post-norm layers with hidden size 768; 15 % of the tokens are masked, drawn anew at every step (Devlin et
al. 2019, section 3.1 and appendix A.2). There is no next-sentence prediction and no pooler, as RoBERTa found
best. All rows have 512 tokens; the paper began with 128.

    jaxgpt train configs/bert_base.py --data.path data/books

Expected: 109,514,298 parameters with the masked-LM head; not trained by us.
"""

from jaxgpt.config import Bert, Compute, MaskedLM, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="bert_base",
        model=Bert(),
        data=Text(path="data/books", workers=8),
        objective=MaskedLM(),
        optim=Optim(
            peak_lr=1e-4,
            final_lr=0.0,
            schedule="linear",
            warmup_steps=10_000,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
        ),
        train=Train(steps=1_000_000, batch_size=256, eval_batches=20, eval_every=5000, save_every=5000),
        compute=Compute(dtype="bfloat16"),
    )
