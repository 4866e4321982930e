"""Gemma 2 2B's shape: what do soft-caps, norms on both sides and windows in every other layer cost?

Layers alternate between a window of 4096 tokens and all 8192. Attention scores are capped at 50 and logits at
30, every branch has norms on its input and output, the MLP is GeGLU, and embeddings are scaled by the square
root of the hidden size (Gemma 2, section 2, and the released configuration).

    jaxgpt train configs/gemma2_2b.py --data.path data/web256k --mesh.fsdp 16

Expected: 2.61 billion parameters, 0.59 of them in the embedding; not trained by us, and the report gives no
recipe (this size was distilled).
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="gemma2_2b",
        model=GPT(
            vocab_size=256_000,
            context=8192,
            layers=26,
            width=2304,
            heads=8,
            kv_heads=4,
            head_width=256,
            mlp_width=9216,
            position="rope",
            norm="rmsnorm",
            norm_at="both",
            norm_eps=1e-6,
            zero_centered_norm=True,
            mlp="geglu",
            bias=False,
            attention_softcap=50.0,
            attention_scalar=256.0,
            embed_scale=True,
            logit_softcap=30.0,
            windows=(4096, 0),
        ),
        data=Text(path="data/web256k", workers=8),
        optim=Optim(peak_lr=3e-4, final_lr=3e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=256, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
