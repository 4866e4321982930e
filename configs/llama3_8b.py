"""Llama 3 8B's shape: does the step fit and shard on a pod before anyone pays for one?

RMSNorm, RoPE with base 500,000, SwiGLU, eight key-value heads, no biases, untied output projection
(Llama 3, section 3.2). `jaxgpt info configs/llama3_8b.py --mesh.fsdp 16 --mesh.tensor 4` prints what it
needs.

    jaxgpt train configs/llama3_8b.py --data.path data/web128k --mesh.fsdp 64

Expected: 8.03 billion parameters; not trained by us.
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="llama3_8b",
        model=GPT(
            vocab_size=128_256,
            context=8192,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            mlp_width=14_336,
            position="rope",
            rope_theta=500_000.0,
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
            tied=False,
        ),
        data=Text(path="data/web128k", workers=8),
        optim=Optim(peak_lr=3e-4, final_lr=3e-6, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=512, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
