"""A run of random parameters with a text of its own, and a model that knows one sentence by heart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tiny import FLOAT32, MODERN, sharp_params

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import Run, to_json
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
MODEL = replace(MODERN, vocab_size=264, context=32, layers=1, windows=(), logit_softcap=30.0)
COMPUTE = replace(FLOAT32, unroll=1)  # compiles in half the time
ROWS = 4
"""Rows of a batch in every test: they share one compiled program."""
TEXT = "the cat sat on a mat while seven dogs ran over green hills — and far away. " * 9


def save_run(folder: Path, data: Any, model: Any = MODEL, params: Any = None, **parts: Any) -> Path:
    """A run's folder with one checkpoint at step 5, as training leaves it."""
    run = Run(name=folder.name, model=model, data=data, compute=COMPUTE, **parts)
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    checkpoints = Checkpoints(folder)
    state = State(jnp.int32(5), jnp.int32(0), params or sharp_params(model), {"unused": jnp.zeros(1)})
    checkpoints.save(state, {}, 1.0)
    checkpoints.close()
    return folder
