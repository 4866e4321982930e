"""How much of what pruning costs does distillation from the original bring back?

A Shakespeare model keeps two of its four layers, and then learns from the whole one.

    jaxgpt prune runs/shakespeare_char runs/pruned --layers 2 --text tinyshakespeare.txt
    jaxgpt train configs/distill.py --init-from runs/pruned

`--init-from` also gives the smaller model; with `--objective.hard-weight 1` it is plain training.
`runs/shakespeare_char` is that of configs/shakespeare_char.py.

Expected: nearly all that pruning cost is back after 300 steps, by either
  (benchmarks/results/pruning_2026-11-27.md).
"""

from jaxgpt.config import GPT, Compute, Distillation, Optim, Run, Text, Train


def config() -> Run:
    return Run(
        name="distill",
        model=GPT(vocab_size=264, context=64, layers=2, heads=4, width=128, bias=False),
        data=Text(path="data/shakespeare"),
        objective=Distillation(teacher="runs/shakespeare_char", softening=1.0, hard_weight=0.0),
        optim=Optim(peak_lr=1e-3, final_lr=1e-4, b2=0.995, warmup_steps=50),
        train=Train(steps=500, batch_size=12, eval_every=100, eval_batches=20),
        compute=Compute(dtype="float32"),
    )
