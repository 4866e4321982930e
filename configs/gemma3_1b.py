"""Gemma 3 1B's shape: how little does a long context cost when five of six layers see 512 tokens?

Five layers with a window of 512 tokens and RoPE base 10,000, then one without a window and with base
1,000,000; normalised queries and keys in place of Gemma 2's soft-caps; one key-value head (Gemma 3, section
2, and the released configuration).

    jaxgpt train configs/gemma3_1b.py --data.path data/web262k --mesh.fsdp 16

Expected: 1.00 billion parameters, 0.30 of them in the embedding; not trained by us, and the report gives no
recipe (this size was distilled).
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="gemma3_1b",
        model=GPT(
            vocab_size=262_144,
            context=32_768,
            layers=26,
            width=1152,
            heads=4,
            kv_heads=1,
            head_width=256,
            mlp_width=6912,
            position="rope",
            rope_theta=1e6,
            rope_local_theta=1e4,
            norm="rmsnorm",
            norm_at="both",
            norm_eps=1e-6,
            zero_centered_norm=True,
            mlp="geglu",
            bias=False,
            qk_norm=True,
            attention_scalar=256.0,
            embed_scale=True,
            windows=(512, 512, 512, 512, 512, 0),
        ),
        data=Text(path="data/web262k", length=8192, workers=8),
        optim=Optim(peak_lr=6e-4, final_lr=6e-5, warmup_steps=2000),
        train=Train(steps=100_000, batch_size=256, eval_batches=20, eval_every=1000, save_every=1000),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),
    )
