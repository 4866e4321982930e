"""GPT-3's eight sizes: what does each need before its first step?

Table 2.1 of Brown et al. (2020), with its batch sizes and learning rates: dense and locally banded attention
in alternation, context 2048, weight decay 0.1, b1 0.9, b2 0.95, warm-up over 375 million tokens, cosine decay
to 10 %, 300 billion tokens in all. `config()` is the smallest size. To train another one, run
`jaxgpt sweep configs/gpt3.py --only 13b --data.path data/web`.

    jaxgpt info configs/gpt3.py
    jaxgpt train configs/gpt3.py --data.path data/web

Where the paper leaves something unspecified or its table is inconsistent:
- The paper does not give the bandwidth of the attention ("similar to the Sparse Transformer"); we chose 256.
- The table gives 1.3B 24 heads of size 128, which does not match its hidden size of 2048 and would make 1.52
  billion parameters; with 16 heads of 128 it has 1.316 billion.
- The table gives 13B a hidden size of 5140, which is not 40 heads of 128 = 5120. Taken literally, with the
  heads narrower than the residual stream, it has 12.94 billion parameters; with 5120 it would have 12.85.
- Its batches (0.5M, 1M, 2M, 3.2M tokens per step) are rows of 2048: 256, 512, 1024 and 1600.
- Its cosine ends after 260 of the 300 billion tokens, ours at the last; its batch grows over the first 4 to
  12 billion tokens, ours does not.

Expected: parameters within 2 % of the table's (its 350M has 356 million, its 1.3B and 2.7B have 1.316 and
2.652 billion); not trained by us.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train

CONTEXT, BAND, TOKENS, WARMUP = 2048, 256, 300e9, 375e6


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    head_width: int
    rows: int
    peak_lr: float
    mesh: Mesh
    accumulate: int = 1


SIZES = {
    "125m": Size(12, 768, 12, 64, 256, 6.0e-4, Mesh(data=-1)),
    "350m": Size(24, 1024, 16, 64, 256, 3.0e-4, Mesh(data=-1)),
    "760m": Size(24, 1536, 16, 96, 256, 2.5e-4, Mesh(data=-1)),
    "1.3b": Size(24, 2048, 16, 128, 512, 2.0e-4, Mesh(data=1, fsdp=-1)),
    "2.7b": Size(32, 2560, 32, 80, 512, 1.6e-4, Mesh(data=1, fsdp=-1)),
    "6.7b": Size(32, 4096, 32, 128, 1024, 1.2e-4, Mesh(data=1, fsdp=-1)),
    # 5140 = 4 x 5 x 257: only a split into 4 parts suits real machines.
    "13b": Size(40, 5140, 40, 128, 1024, 1.0e-4, Mesh(data=-1, fsdp=4, tensor=2)),
    "175b": Size(96, 12_288, 96, 128, 1600, 0.6e-4, Mesh(data=1, fsdp=-1, tensor=8), 5),
}


def build(name: str) -> Run:
    size = SIZES[name]
    tokens = size.rows * CONTEXT
    return Run(
        name=f"gpt3_{name}",
        model=GPT(
            vocab_size=50_304,  # 50,257 plus padding
            context=CONTEXT,
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            head_width=size.head_width,
            windows=(0, BAND),
        ),
        data=Text(path="data/web", workers=8),
        optim=Optim(
            peak_lr=size.peak_lr,
            final_lr=size.peak_lr / 10,
            warmup_steps=round(WARMUP / tokens),
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
        ),
        train=Train(
            steps=round(TOKENS / tokens),
            batch_size=size.rows,
            accumulate=size.accumulate,
            eval_batches=20,
            eval_every=1000,
            save_every=1000,
        ),
        mesh=size.mesh,
        compute=Compute(dtype="bfloat16", remat="full"),
    )


def config() -> Run:
    return build("125m")


def sweep() -> Iterator[tuple[str, Run]]:
    for name in SIZES:
        yield name, build(name)
