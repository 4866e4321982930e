"""Compares the whole small run, `configs/shakespeare_char.py`, with the same setting in eager PyTorch.

    python benchmarks/shakespeare.py TINYSHAKESPEARE.txt --torch-python TORCH_ENV/bin/python [--rounds 3]

The seconds are those of a whole process: imports, compilation (no cache: an empty folder per round), 2,000
steps, evaluations and checkpoints. The PyTorch side is our own plain program with the same model, data,
schedule and number of evaluations, without checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.common import alternate, machine, report, row

ROOT = Path(__file__).parents[1]

TORCH = """
import math, sys, torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(1337)
L, H, D, T, B, STEPS = 4, 4, 128, 64, 12, 2000
data = torch.frombuffer(bytearray(open(sys.argv[1], "rb").read()), dtype=torch.uint8).long()
cut = int(0.9 * len(data))
parts = {"train": data[:cut], "validation": data[cut:]}

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
    def forward(self, x):
        heads = (y.view(*y.shape[:2], H, D // H).transpose(1, 2) for y in self.qkv(self.n1(x)).split(D, -1))
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(264, D), nn.Embedding(T, D)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(D, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if residual else 0.02)
    def forward(self, x, y):
        h = self.tokens(x) + self.places.weight
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy((self.norm(h) @ self.tokens.weight.T).flatten(0, 1), y.flatten())

def batch(part):
    starts = torch.randint(len(part) - T, (B,)).tolist()
    return tuple(torch.stack([part[i + s : i + s + T] for i in starts]) for s in (0, 1))

model = Model()
matrices = [p for p in model.parameters() if p.ndim > 1]
vectors = [p for p in model.parameters() if p.ndim == 1]
groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
for step in range(STEPS):
    rate = 1e-3 * (step + 1) / 100
    if step >= 100:
        rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    model(*batch(parts["train"])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if (step + 1) % 250 == 0:
        with torch.no_grad():
            losses = [model(*batch(parts["validation"])).item() for _ in range(20)]
with torch.no_grad():
    rows = parts["validation"][: (len(parts["validation"]) - 1) // (T * B) * T * B + 1]
    x, y = rows[:-1].view(-1, B, T), rows[1:].view(-1, B, T)
    print(sum(model(*pair).item() for pair in zip(x, y)) / len(x))
"""


def main(
    text: tyro.conf.Positional[Path], torch_python: str, rounds: int = 3, out: str | None = None
) -> None:
    """Run the benchmark.

    Args:
      text: tinyshakespeare.txt.
      torch_python: interpreter with torch.
      rounds: number of counted whole runs per side, after one uncounted run of each.
      out: file to which the result is appended as a JSON line.
    """
    about, losses = machine(), {"ours": [], "torch": []}
    # Bytecode is kept, as on a user's machine; the uncounted round writes it.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jaxgpt = [sys.executable, "-m", "jaxgpt.cli"]
        split = ["--tokenizer", "byte", "--validation", "0.1", "--split", "tail"]
        prepare = [*jaxgpt, "data", "prepare", str(text.resolve()), "--out", "data/shakespeare", *split]
        subprocess.run(prepare, check=True, cwd=work, env=environment, stderr=subprocess.DEVNULL)

        def ours() -> float:
            name = f"round{len(losses['ours'])}"
            cache = {"JAX_COMPILATION_CACHE_DIR": str(work / name)}
            config = str(ROOT / "configs" / "shakespeare_char.py")
            start = time.perf_counter()
            command = [*jaxgpt, "train", config, "--name", name]
            subprocess.run(command, check=True, cwd=work, env=environment | cache, capture_output=True)
            seconds = time.perf_counter() - start
            losses["ours"].append(whole_loss(work / "runs" / name, jaxgpt, environment))
            return seconds

        def theirs() -> float:
            command = [torch_python, "-c", TORCH, str(text.resolve())]
            start = time.perf_counter()
            done = subprocess.run(
                command, check=True, cwd="/", env=environment, capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
            losses["torch"].append(float(done.stdout))
            return seconds

        figures = alternate(ours, theirs, rounds)
    name = "shakespeare_char, 2,000 steps, whole process"
    report([row(name, "seconds", *figures, validation_loss=losses)], about, out)
    for side, found in losses.items():
        print(f"validation loss over the whole validation split, {side}: {found}")


def whole_loss(run: Path, jaxgpt: list[str], environment: dict[str, str]) -> float:
    """Loss of a run's best checkpoint over all validation tokens, not just the 20 batches of the loop."""
    code = (
        "import json, sys; from jaxgpt.evals.loss import validation_loss;"
        "print(json.dumps(validation_loss(sys.argv[1])))"
    )
    command = [jaxgpt[0], "-c", code, str(run)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=run.parents[1]
    )
    return json.loads(done.stdout)["loss"]


if __name__ == "__main__":
    tyro.cli(main)
