"""Decoding on a CPU in float32, bfloat16 and int8, against Hugging Face `generate` and CTranslate2.

    python benchmarks/decoding.py --torch-python TORCH_ENV/bin/python [--stories FOLDER] [--out FILE]

TORCH_ENV has torch, transformers and ctranslate2. The weights are the same on all sides: a random GPT-2 of
124M parameters, and a Hugging Face folder if one is named. Two threads each. A figure is tokens/s between
the third and the 63rd new token of each row, so that neither prefill nor a call's fixed costs count; rounds
of all sides alternate and never overlap.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.common import TorchWorker, machine
from benchmarks.peaks import THREADS, read_bandwidth
from jaxgpt.config import ONE_DEVICE, Compute, Sampling
from jaxgpt.config.decoding import Weights
from jaxgpt.convert.load import load_model
from jaxgpt.runtime import keep_memory
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import Trained

PROMPT, SHORT, LONG = 65, 3, 63
MAKE = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config()).save_pretrained({folder!r})
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = letters + [f"t{{i}}" for i in range(len(letters), 50256)] + ["<|endoftext|>"]
made = Tokenizer(models.BPE({{word: i for i, word in enumerate(words)}}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[-1], eos_token=words[-1], bos_token=words[-1]
    ).save_pretrained({folder!r})
def ready(): return {{}}
def round(): return 0.0
"""
COMMON = """
import os, time
os.environ["OMP_NUM_THREADS"] = "{threads}"
B, T, SHORT, LONG = {batch}, {prompt}, {short}, {long}
def round():
    seconds = []
    for n in (SHORT, LONG):
        start = time.perf_counter()
        made(n)
        seconds.append(time.perf_counter() - start)
    return B * (LONG - SHORT) / (seconds[1] - seconds[0])
"""
TORCH = """
import torch, transformers
torch.set_num_threads({threads})
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{kind}).eval()
x = torch.randint(3, 250, (B, T))
def ready(): return dict(torch=torch.__version__, transformers=transformers.__version__)
def made(n):
    with torch.no_grad():
        out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, min_new_tokens=n,
                             do_sample=False, use_cache=True, pad_token_id=0)
    assert out.shape == (B, T + n)
"""
CT2 = """
import json, random, tempfile, ctranslate2
from ctranslate2.converters import TransformersConverter
folder = tempfile.mkdtemp()
TransformersConverter({folder!r}).convert(folder, quantization={kind!r}, force=True)
model = ctranslate2.Generator(folder, device="cpu", compute_type={kind!r}, intra_threads={threads})
words = json.load(open(folder + "/vocabulary.json"))
prompts = [[words[random.randrange(3, 250)] for _ in range(T)] for _ in range(B)]
def ready(): return dict(ctranslate2=ctranslate2.__version__)
def made(n):
    out = model.generate_batch(prompts, max_length=n, min_length=n, sampling_topk=1, beam_size=1,
                               include_prompt_in_result=False, end_token=[], max_batch_size=0)
    assert all(len(one.sequences_ids[0]) == n for one in out)
"""


@dataclass(frozen=True)
class Side:
    """One program that decodes in one type."""

    who: str
    kind: str
    run: Callable[[], float]
    close: Callable[[], None] = lambda: None
    megabytes: float = 0.0
    """Of weights that a step reads."""


def ours(trained: Trained, kind: str, batch: int) -> Side:
    """A side of this code base, with the layout that is fastest; `int8` computes the rest in float32."""
    compute = Compute(dtype="bfloat16" if kind == "bfloat16" else "float32")
    parts = (trained.run.model, compute, trained.params, trained.tokenizer)
    layouts: dict[str, Weights] = {"float32": "own", "bfloat16": "by_output", "int8": "int8"}
    generator = Generator(*parts, weights=layouts[kind])
    prompts = np.random.default_rng(0).integers(3, 250, (batch, PROMPT)).tolist()

    def seconds(new: int) -> float:
        start = time.perf_counter()
        done = generator.generate(prompts, Sampling(temperature=0), max_new_tokens=new, stop=())
        assert all(len(one.ids) == new for one in done)
        return time.perf_counter() - start

    def run() -> float:
        short, long = seconds(SHORT), seconds(LONG)
        return batch * (LONG - SHORT) / (long - short)

    read = dict(generator.params)
    read.pop("position", None)  # one row of it is read, as of a table of tokens that is no projection too
    if not trained.run.model.tied:
        read.pop("embed")
    return Side("jaxgpt", kind, run, megabytes=sum(w.nbytes for w in jax.tree.leaves(read)) / 1e6)


def theirs(python: str, who: str, kind: str, folder: str, batch: int) -> tuple[Side, dict[str, str]]:
    """A worker of the other environment, and its versions."""
    sizes = {"batch": batch, "prompt": PROMPT, "short": SHORT, "long": LONG, "threads": THREADS}
    source = COMMON + {"Hugging Face": TORCH, "CTranslate2": CT2}[who]
    worker = TorchWorker(python, source.format(**sizes, folder=folder, kind=kind))
    return Side(who, kind, worker.round, worker.close), worker.versions


def compare(
    name: str, folder: str, python: str, batch: int, rounds: int
) -> tuple[list[dict], dict[str, str]]:
    """Figures of all sides for one model and batch size."""
    trained, versions = load_model(Path(folder), ONE_DEVICE), dict[str, str]()
    sides = [ours(trained, kind, batch) for kind in ("float32", "bfloat16", "int8")]
    others = [("Hugging Face", "float32"), ("Hugging Face", "bfloat16"), ("CTranslate2", "float32")]
    for who, kind in [*others, ("CTranslate2", "int8")]:
        side, found = theirs(python, who, kind, folder, batch)
        sides.append(side)
        versions |= found
    figures: dict[Side, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            figure = side.run()
            if turn:  # the first compiles
                figures[side].append(figure)
    rows = []
    for side, all_figures in figures.items():
        speed = statistics.median(all_figures)
        rows.append({
            "model": name, "batch": batch, "who": side.who, "type": side.kind, "tokens_per_s": speed,
            "GB_per_s": speed / batch * side.megabytes / 1e3, "all": [round(x, 1) for x in all_figures],
            "load": round(os.getloadavg()[0], 2),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        side.close()
    return rows, versions


def show(rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Print the table."""
    heads = ["model", "batch", "type", "jaxgpt", "Hugging Face", "CTranslate2", "ratio", "GB/s", "share"]
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    found = {(r["model"], r["batch"], r["who"], r["type"]): r for r in rows}
    for (model, batch, who, kind), row in found.items():
        if who != "jaxgpt":
            continue
        speeds = [row["tokens_per_s"]]
        for other in ("Hugging Face", "CTranslate2"):
            speeds.append(found.get((model, batch, other, kind), {}).get("tokens_per_s", float("nan")))
        cells = " | ".join(f"{speed:.1f}" for speed in speeds)
        share = row["GB_per_s"] / bandwidth
        print(
            f"| {model} | {batch} | {kind} | {cells} | {speeds[0] / speeds[2]:.2f} | {row['GB_per_s']:.1f} "
            f"| {share:.0%} |"
        )


def main(
    torch_python: str,
    stories: str = "",
    batches: tuple[int, ...] = (1, 8, 32),
    rounds: int = 5,
    out: str | None = None,
) -> None:
    """Run the benchmark.

    Args:
      torch_python: interpreter with torch, transformers and ctranslate2.
      stories: a Hugging Face folder of a small model to measure too.
      batches: batch sizes.
      rounds: counted rounds of each side.
      out: file to which the result is appended as a JSON line.
    """
    about: dict[str, Any] = machine()
    keep_memory()
    about["read_GB_per_s"] = bandwidth = read_bandwidth()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        TorchWorker(torch_python, MAKE.format(folder=folder)).close()
        models = {"GPT-2 124M": folder} | (
            {Path(stories).name: str(Path(stories).resolve())} if stories else {}
        )
        for name, path in models.items():
            for batch in batches:
                more, versions = compare(name, path, torch_python, batch, rounds)
                rows += more
                about |= versions
    about["read_GB_per_s"] = bandwidth = max(bandwidth, read_bandwidth())
    print(
        f"\n`{' '.join(sys.argv)}`  memory is read at {bandwidth:.1f} GB/s; load at the start {about['load']}"
    )
    show(rows, bandwidth)
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"command": " ".join(sys.argv), **about, "rows": rows}) + "\n")


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    tyro.cli(main)
