"""SmolLM2 135M's shape: does depth pay off at GPT-2's size?

30 narrow layers of Llama's blocks, nine attention heads, three key-value heads, a tied output projection and
the warmup-stable-decay schedule (Allal et al. 2025, and the released configuration).

    jaxgpt train configs/smollm2_135m.py --data.path data/web49k

Expected: 0.135 billion parameters, 0.028 of them in the embedding; not trained by us (SmolLM2 saw 2 trillion
tokens at this size, this config trains on 100 billion).
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="smollm2_135m",
        model=GPT(
            vocab_size=49_152,
            context=8192,
            layers=30,
            width=576,
            heads=9,
            kv_heads=3,
            mlp_width=1536,
            position="rope",
            rope_theta=100_000.0,
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
        ),
        data=Text(path="data/web49k", length=2048, workers=8),
        optim=Optim(peak_lr=3e-3, final_lr=0.0, schedule="wsd", decay_fraction=0.2, warmup_steps=2000),
        train=Train(steps=95_400, batch_size=512, eval_batches=20, eval_every=1000, save_every=1000),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
