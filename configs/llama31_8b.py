"""Llama 3.1 8B's shape: what do 131,072 tokens of context change about Llama 3's?

Only RoPE changes: wavelengths longer than a quarter of the 8192 pretraining tokens are stretched, those
beyond 8192 eightfold (Llama 3, section 3.4.2, and the released configuration). Rows have 8192 tokens, as in
pretraining. `--data.length 131072 --train.batch-size 64` is the long-context stage, which needs a kernel that
stores no T x T mask (cuDNN, splash).

    jaxgpt train configs/llama31_8b.py --data.path data/web128k --mesh.fsdp 64

Expected: 8.03 billion parameters, as many as Llama 3; not trained by us.
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, RopeScaling, Run, Text, Train


def config() -> Run:
    return Run(
        name="llama31_8b",
        model=GPT(
            vocab_size=128_256,
            context=131_072,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            mlp_width=14_336,
            position="rope",
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(form="llama3", factor=8.0, original_context=8192),
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
            tied=False,
        ),
        data=Text(path="data/web128k", length=8192, workers=8),
        optim=Optim(peak_lr=3e-4, final_lr=3e-6, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=512, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
