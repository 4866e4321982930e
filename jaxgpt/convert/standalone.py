"""Runs a model that `jaxgpt export --format stablehlo` wrote, with jax alone.

    pip install jax flatbuffers                        # jax.export reads programs with the second
    python generate.py 1 403 407 261 --count 20        # token ids in, token ids out, greedy

A copy of this file lies beside the model as generate.py. `prefill(weights, tokens, length)` reads prompts
padded on the right to `context`; `decode(weights, token, position, cache)` reads one more token per row. Both
give the logits [rows, ids] after the last token, and the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Model:
    """An exported model.

    Args:
      folder: where its files are.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text("utf-8"))
        with np.load(folder / "weights.npz") as held:
            pairs = zip((held[name] for name in held.files), self.about["dtypes"], strict=True)
            self.weights = [jnp.asarray(array.view(jnp.dtype(dtype))) for array, dtype in pairs]
        read = {
            name: bytearray((folder / f"{name}.stablehlo").read_bytes()) for name in ("prefill", "decode")
        }
        programs = {name: jax.export.deserialize(data) for name, data in read.items()}
        self.prefill = jax.jit(programs["prefill"].call)
        self.decode = jax.jit(programs["decode"].call, donate_argnums=3)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most probable continuation, up to `count` ids or one that ends a text.

        Args:
          prompt: ids, the one that begins a text included where the model was trained with it (`bos`).
          count: most ids.
        """
        about, rows = self.about, self.about["rows"]
        count = min(count, about["context"] - len(prompt))
        tokens = np.zeros((rows, about["context"]), np.int32)
        tokens[:, : len(prompt)] = prompt
        length = np.full(rows, len(prompt), np.int32)
        logits, cache = self.prefill(self.weights, tokens, length)
        made: list[int] = []
        while len(made) < count:
            made.append(int(np.asarray(logits)[0, : about["ids"]].argmax()))
            if made[-1] in about["stop"] or len(made) == count:
                break
            token = np.full(rows, made[-1], np.int32)
            logits, cache = self.decode(self.weights, token, length, cache)
            length = length + 1
        return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ids", type=int, nargs="+")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--folder", default=str(Path(__file__).parent))
    asked = parser.parse_args()
    print(*Model(asked.folder).generate(asked.ids, asked.count))
