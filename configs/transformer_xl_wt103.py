"""How well does a Transformer-XL with 151M parameters and a memory of 150 tokens model WikiText-103?

The base model of Dai et al. 2019 (table 1) with the settings of the authors' run_wt103_base.sh: 16 layers
with hidden size 410, segments and memory of 150 tokens, adaptive embedding and softmax over 267,735 ids,
Adam without weight decay. parameter_counts gives 151,107,538; the paper says 151M.

    jaxgpt tokenizer train wikitext-103/train.txt --out data/wt103-tokenizer \\
        --vocab-size 267735 --model-type unigram
    jaxgpt data prepare wikitext-103/*.txt --out data/wt103 --tokenizer data/wt103-tokenizer
    jaxgpt train configs/transformer_xl_wt103.py

Adaptive clusters need ids in order of frequency, as in a unigram tokenizer. The paper counts words and uses
other tokens than ours, so its perplexity of 24.0 on the test split compares with ours only through bits per
byte (report.html has them).

Expected: not measured yet; 200,000 steps of 9,000 tokens took the authors several days on four GPUs.
"""

from jaxgpt.config import Optim, Run, Text, Train, TransformerXL


def config() -> Run:
    return Run(
        name="transformer_xl_wt103",
        model=TransformerXL(
            vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), shared_biases=True, dropout=0.1
        ),
        data=Text(path="data/wt103", contiguous=True),
        optim=Optim(peak_lr=2.5e-4, final_lr=0.0, warmup_steps=0, b2=0.999, weight_decay=0.0, clip_norm=0.25),
        train=Train(steps=200_000, batch_size=60, log_every=200, eval_every=4000, save_every=4000, seed=1111),
    )
