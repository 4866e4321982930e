"""Folders that `jaxgpt export --peft` writes, read by Hugging Face's peft, give the same logits.

    python benchmarks/peft_folders.py --torch-python TORCH_ENV/bin/python

Random adapters of every method over the tiny models of tests/goldens, written here and read there
(torch, transformers and peft in an environment of their own); the largest difference of logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import save_file

from jaxgpt.batch import Batch
from jaxgpt.config import IA3, Compute, DoRA, LoRA, PrefixTuning, PromptTuning
from jaxgpt.convert import files, weights
from jaxgpt.convert.peft import write_adapter
from jaxgpt.convert.registry import read_config
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sharding import make_mesh
from jaxgpt.target import Target
from jaxgpt.tune import make_tuning

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
METHODS: dict[str, Any] = {
    "LoRA, all linear layers": LoRA(rank=3, alpha=5.0),
    "LoRA of q and v": LoRA(rank=4, targets=("*.q", "*.v")),
    "rsLoRA": LoRA(rank=3, alpha=2.0, rank_stabilized=True),
    "DoRA": DoRA(rank=3),
    "IA3": IA3(),
    "prompt tuning": PromptTuning(tokens=5),
    "prefix tuning": PrefixTuning(tokens=5),
}
TORCH = """
import sys, numpy as np, torch, transformers as hf, peft
base, adapter, tokens, out = sys.argv[1:]
model = hf.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval()
tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
ids = torch.tensor(np.load(tokens)).long()
with torch.no_grad():
    np.save(out, tuned(input_ids=ids).logits[:, -ids.shape[1]:].numpy())
"""


def main(torch_python: Path) -> None:
    """Write, read and compare."""
    compute, target = Compute(dtype="float32", attention="xla"), Target.of()
    print("| base | method | largest difference | standard deviation of the logits |\n|---|---|---:|---:|")
    worst = 0.0
    for name in ("llama", "gpt2"):
        stored = dict(np.load(GOLDENS / f"{name}.npz"))
        with tempfile.TemporaryDirectory() as work:
            base = Path(work, "base")
            base.mkdir()
            (base / "config.json").write_text(str(stored["config"]))
            tensors = {k[8:]: np.float32(v) for k, v in stored.items() if k.startswith("tensors/")}
            save_file(tensors, base / files.ONE, {"format": "pt"})
            family, model = read_config(json.loads(str(stored["config"])), name)
            found = files.headers(base)
            model = weights.as_found(family, model, found, files.read_json(base / files.CONFIG))
            used, _ = weights.check(family, model, found, name)
            params = weights.load(family, model, found, used, make_mesh({"data": 1}))
            graph = abstract_model(model, compute, target)[0]
            tokens = jnp.asarray(stored["tokens"])
            np.save(Path(work, "tokens.npy"), stored["tokens"])
            for number, (method, tune) in enumerate(METHODS.items()):
                tuning = make_tuning(tune, model, compute, target)
                random = np.random.default_rng(number)
                learned = jax.tree.map(
                    lambda x, r=random: x + jnp.float32(0.2 * r.standard_normal(x.shape)),
                    tuning.init(jax.random.key(0), params),
                )
                ones, places = (
                    jnp.ones_like(tokens),
                    jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
                )
                batch = Batch(tokens, tokens, jnp.float32(ones), ones, places)
                module = assemble(graph, tuning.enter(learned, tuning.freeze(params), None))
                ours = np.asarray(module.logits(module.hidden(batch).x_BTD))
                adapter = Path(work, f"adapter-{number}")
                adapter.mkdir()
                write_adapter(adapter, tune, jax.device_get(learned), family, model)
                out = Path(work, f"{number}.npy")
                words = [str(base), str(adapter), str(Path(work, "tokens.npy")), str(out)]
                done = subprocess.run([torch_python, "-c", TORCH, *words], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                theirs = np.load(out)
                worst = max(worst, float(np.abs(ours - theirs).max()))
                print(
                    f"| {name} | {method} | {np.abs(ours - theirs).max():.1e} | {theirs.std():.2f} |",
                    flush=True,
                )
    if worst > 1e-4:
        sys.exit(f"a difference of {worst:.1e} is more than 1e-4")


if __name__ == "__main__":
    tyro.cli(main)
