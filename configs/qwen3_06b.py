"""Qwen3 0.6B's shape: what do heads wider than the residual stream and normalised queries and keys cost?

16 attention heads of size 128 on a hidden size of 1024, eight key-value heads, RMSNorm on queries and keys in
place of Qwen2's biases (Qwen3, section 2, and the released configuration).

    jaxgpt train configs/qwen3_06b.py --data.path data/web152k

Expected: 0.596 billion parameters, 0.156 of them in the embedding; not trained by us, and the report gives no
recipe for this size.
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="qwen3_06b",
        model=GPT(
            vocab_size=151_936,
            context=40_960,
            layers=28,
            width=1024,
            heads=16,
            kv_heads=8,
            head_width=128,
            mlp_width=3072,
            position="rope",
            rope_theta=1e6,
            norm="rmsnorm",
            norm_eps=1e-6,
            mlp="swiglu",
            bias=False,
            qk_norm=True,
        ),
        data=Text(path="data/web152k", length=4096, workers=8),
        optim=Optim(peak_lr=6e-4, final_lr=6e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=256, eval_batches=20, eval_every=1000, save_every=1000),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
