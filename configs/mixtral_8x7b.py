"""Mixtral 8x7B's shape: what do eight experts per layer need when each token uses two?

Mistral's blocks without the window, with eight SwiGLU experts in place of each MLP and a softmax over the two
experts of each token (Jiang et al. 2024, section 2, and the released configuration).

    jaxgpt train configs/mixtral_8x7b.py --data.path data/web32k --mesh.fsdp 16 --mesh.expert 8

Expected: 46.7 billion parameters, 12.9 of them active per token; not trained by us. The paper gives no
recipe: the learning rate and batch size here are Llama's.
"""

from jaxgpt.config import GPT, Compute, Mesh, MoE, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="mixtral_8x7b",
        model=GPT(
            vocab_size=32_000,
            context=32_768,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            mlp_width=14_336,
            position="rope",
            rope_theta=1e6,
            norm="rmsnorm",
            mlp="swiglu",
            moe=MoE(experts=8, per_token=2, balance=0.02),
            bias=False,
            tied=False,
        ),
        data=Text(path="data/web32k", length=8192, workers=8),
        optim=Optim(peak_lr=3e-4, final_lr=3e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=512, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1, expert=4),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
