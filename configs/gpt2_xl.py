"""GPT-2's largest size, 1.56 billion parameters: what changes when a model outgrows one device?

The data of `gpt2_124m.py`. Parameters and optimizer state are sharded over the `fsdp` axis. The backward pass
recomputes the layers except for their matrix products.

    jaxgpt train configs/gpt2_xl.py --mesh.fsdp 8

Expected: about 3.0 nats per token after 20 billion tokens, extrapolated from the smaller sizes; we have not
yet run it.
"""

from jaxgpt.config import GPT, Compute, Mesh, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="gpt2_xl",
        model=GPT(vocab_size=50_304, context=1024, layers=48, heads=25, width=1600),
        data=Text(path="data/web", workers=4),
        optim=Optim(peak_lr=2e-4, final_lr=2e-5, warmup_steps=2000),
        train=Train(steps=40_000, batch_size=512, accumulate=4, eval_batches=20, eval_every=500, keep=2),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="dots"),
    )
