"""Texts to vectors by a run: the mean of the features of a full forward pass, whatever stands beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import model_of, plain
from tiny_models import FLOAT32

from jaxgpt.config import Run, Text
from jaxgpt.sample.encode import RunEncoder
from jaxgpt.sample.load import Trained
from jaxgpt.sharding import make_mesh
from jaxgpt.text.retrieve import Passage, Retriever
from jaxgpt.text.tokenizer import ByteTokenizer

TEXTS = ["a river", "", "the heron stands in the river", "河边有白鹭", "copper"]


def test_vectors_are_means_of_features_and_find_a_planted_passage(modern: Any) -> None:
    model, params, _ = modern
    run = Run(name="r", model=model, data=Text(path="x"), compute=FLOAT32)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
    tokenizer = ByteTokenizer()
    encode = RunEncoder(Trained(Path("r"), run, params, tokenizer, mesh, 1))
    vectors_ND = encode(TEXTS)
    for text, vector_D in list(zip(TEXTS, vectors_ND, strict=True))[1:4:2]:
        ids = [tokenizer.control["<|bos|>"], *text.encode()]
        features_BTD = model_of(model)(params).hidden(plain(jnp.asarray([ids]))).x_BTD
        np.testing.assert_allclose(vector_D, features_BTD[0].mean(0), atol=1e-4)
    np.testing.assert_allclose(encode(["x" * 300]), encode(["x" * 95]), atol=1e-5)  # the context holds 96
    retriever = Retriever.build([Passage(text, str(i)) for i, text in enumerate(TEXTS) if text], encode)
    for i in (2, 3):
        found = retriever.search(TEXTS[i], 2)
        assert found[0].text == TEXTS[i] and 1 - 1e-4 < found[0].score > found[1].score
