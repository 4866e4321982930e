"""Mistral 7B's shape: what does a window of 4096 tokens in every layer save with long rows?

Llama's blocks with eight key-value heads and an attention window of 4096 tokens (version 0.1; Jiang et al.
2023, section 2). The released configuration supports up to 32,768 tokens.

    jaxgpt train configs/mistral_7b.py --data.path data/web32k --mesh.fsdp 64

Expected: 7.24 billion parameters; not trained by us. The paper gives no recipe: the learning rate and batch
size here are Llama's.
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="mistral_7b",
        model=GPT(
            vocab_size=32_000,
            context=32_768,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            mlp_width=14_336,
            position="rope",
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
            tied=False,
            windows=(4096,),
        ),
        data=Text(path="data/web32k", length=8192, workers=8),
        optim=Optim(peak_lr=3e-4, final_lr=3e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=512, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
