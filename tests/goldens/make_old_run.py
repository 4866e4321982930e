"""Run folders of an older jaxgpt, each at step 4 of its 8, and what that jaxgpt made of them.

    cd tests/goldens && PYTHONPATH=OLD JAX_PLATFORMS=cpu python make_old_run.py

`OLD` is a checkout of the revision whose runs are to stay readable. Those that are committed were
written by 05394ecb0285 (as each config.json says), with jax 0.12.0.1 on one CPU device. Writes here:

  old_run.tar.xz  text/, a prepared corpus; words.txt, words with tags; and of each run NAME/, with its
                  config, tokenizer, records and the checkpoint of step 4, all paths relative
  old_run.json    of each run: loss and accuracy on the validation data at step 4, greedy samples, and
                  the losses of the steps that followed; of `gpt` a digest of the tensors it exports

Since then a schedule ends with the last step that is run. The losses were written anew by the same OLD with
today's `optim.schedule` in the place of its own: step 5, which no changed rate has touched yet, is the same.

Together they hold what new configs, parameter names, optimizer groups or data formats could break: a
plain GPT under AdamW, a mixture of experts with windows under Muon, a Transformer-XL with its memory
and adaptive softmax, and labels on a BERT. None has dropout, whose random bits are nobody's contract.
tests/test_old_run.py reads them with today's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jaxgpt.cli import main
from jaxgpt.config import (
    GPT,
    Bert,
    Classification,
    Classifier,
    Compute,
    MoE,
    Optim,
    Run,
    Tagged,
    Text,
    Train,
    TransformerXL,
    to_json,
)
from jaxgpt.evals.loss import validation_loss
from jaxgpt.files import write_json, write_text
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling

HERE = Path(__file__).absolute().parent
WORDS = "the cat sat on a mat while seven dogs ran over green hills and far away".split(" ")  # noqa: SIM905
PROMPTS = ("the cat sat", "seven")
SMALL = {"vocab_size": 264, "context": 32, "layers": 2}
MODELS = {
    "gpt": GPT(**SMALL, width=8, heads=2, mlp_width=16),
    "experts": GPT(
        **SMALL,
        width=4,
        heads=2,
        kv_heads=1,
        mlp_width=4,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        qk_norm=True,
        moe=MoE(experts=4, per_token=2, shared_width=4),
        windows=(8, 0),
    ),
    "memory": TransformerXL(
        **SMALL, segment=16, memory=16, width=4, heads=2, mlp_width=8, cutoffs=(128,), div=2, dropout=0.0
    ),
    "labels": Classifier(
        backbone=Bert(**SMALL, width=4, heads=2, mlp_width=8, dropout=0.0),
        labels=("O", "B-ANIMAL"),
        head_dropout=0.0,
    ),
}


def make_run(name: str) -> Run:
    """The run of a model, with paths relative to the folder that holds them all."""
    model = MODELS[name]
    data: Text | Tagged = Text(path="text", contiguous=name == "memory")
    if name == "labels":
        data = Tagged(train=("words.txt",), validation=("words.txt",), tokenizer="byte")
    return Run(
        name=name,
        model=model,
        data=data,
        optim=Optim(name="muon" if name == "experts" else "adamw", peak_lr=5e-2, warmup_steps=1),
        train=Train(steps=8, batch_size=8, log_every=1, eval_every=4, save_every=4),
        compute=Compute(dtype="float32", unroll=1),  # compiles in half the time
        runs=".",
        **({"objective": Classification()} if name == "labels" else {}),
    )


def make_data() -> None:
    """40 short documents, prepared; and 16 sentences of words with their tags."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(5, 30))) for _ in range(40)]
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert main(["data", "prepare", "a.jsonl", "--out", "text", "--validation", "0.2", "--workers", "1"]) == 0
    Path("a.jsonl").unlink()
    lines = [[f"{w} {'B-ANIMAL' if w in ('cat', 'dogs') else 'O'}\n" for w in t.split()[:5]] for t in texts]
    Path("words.txt").write_text("\n".join("".join(line) for line in lines[:16]))


def train(name: str) -> dict[str, float]:
    """Train 8 steps, go back to what was on disk at step 4, and return the losses of the steps after."""
    write_json(Path(f"{name}.json"), to_json(make_run(name)))
    assert main(["train", f"{name}.json"]) == 0
    Path(f"{name}.json").unlink()
    folder = Path(name)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    early = [line for line, record in zip(lines, records, strict=True) if record["step"] <= 4]
    (folder / "metrics.jsonl").write_text("\n".join(early) + "\n")
    shutil.rmtree(folder / "checkpoints" / "8")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "report.html").unlink(missing_ok=True)
    return {str(r["step"]): r["loss"] for r in records if r["step"] > 4 and "loss" in r}


def sample(name: str) -> list[dict[str, list]]:
    """Greedy continuations of the prompts: ids and their log-probabilities."""
    generator = Generator.load(name)
    prompts = [generator.tokenizer.encode(text) for text in PROMPTS]
    made = generator.generate(prompts, Sampling(temperature=0.0), max_new_tokens=12, stop=())
    return [{"ids": row.ids, "logprobs": row.logprobs} for row in made]


def export(name: str) -> str:
    """SHA-256 over the exported tensors, in the order of their names."""
    assert main(["export", name, "hf"]) == 0
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file("hf/model.safetensors").items()):
        digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    shutil.rmtree("hf")
    return digest.hexdigest()


def make() -> None:
    """Everything, anew."""
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        make_data()
        runs: dict[str, dict[str, Any]] = {name: {"losses": train(name)} for name in MODELS}
        for name, expected in runs.items():
            expected["validation"] = validation_loss(name, batch_size=8)
            if name != "labels":
                expected["samples"] = sample(name)
        runs["gpt"]["exported"] = export("gpt")
        os.chdir(HERE)
        shutil.make_archive("old_run", "xztar", folder)
    write_text(HERE / "old_run.json", json.dumps({"prompts": PROMPTS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    make()
