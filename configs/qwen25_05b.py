"""Qwen2.5 0.5B's shape: how small can a model with a vocabulary of 152 thousand tokens be?

Llama's blocks with biases on queries, keys and values only, two key-value heads and a tied output
projection (Qwen2.5, section 2, and the released configuration).

    jaxgpt train configs/qwen25_05b.py --data.path data/web152k

Expected: 0.494 billion parameters, 0.136 of them in the embedding; not trained by us, and the report gives no
recipe for this size.
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="qwen25_05b",
        model=GPT(
            vocab_size=151_936,
            context=32_768,
            layers=24,
            width=896,
            heads=14,
            kv_heads=2,
            mlp_width=4864,
            position="rope",
            rope_theta=1e6,
            norm="rmsnorm",
            norm_eps=1e-6,
            mlp="swiglu",
            bias=False,
            qkv_bias=True,
        ),
        data=Text(path="data/web152k", length=4096, workers=8),
        optim=Optim(peak_lr=6e-4, final_lr=6e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=256, eval_batches=20, eval_every=1000, save_every=1000),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
