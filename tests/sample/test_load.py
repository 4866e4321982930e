"""A generator from a run's folder: parameters alone, any checkpoint, any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import FLOAT32, MODELS, sharp_params

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.cli import main
from jaxgpt.config import Mesh, Run, Text, to_json
from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State

GREEDY = Sampling(temperature=0)
PROMPT = [1, 2, 3]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, the older one the better."""
    model = MODELS["modern"]
    run = Run(name="r", model=model, data=Text(path="x", length=16), compute=FLOAT32)
    folder = tmp_path_factory.mktemp("runs") / "r"
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    checkpoints = Checkpoints(folder)
    params = sharp_params(model)
    for step, val_loss in ((3, 1.0), (6, 2.0)):
        scaled = params | {"norm": {"scale": params["norm"]["scale"] / step}}
        state = State(jnp.int32(step), jnp.int32(0), scaled, {"unused": jnp.zeros(1)})
        checkpoints.save(state, {}, val_loss)
    checkpoints.close()
    return folder


def scale(generator: Generator) -> float:
    return float(generator.params["norm"]["scale"][0])


def test_the_best_the_newest_and_a_step_can_be_named(folder: Path) -> None:
    assert scale(Generator.load(folder)) == pytest.approx(1 / 3)
    assert scale(Generator.load(folder, which="newest")) == pytest.approx(1 / 6)
    assert scale(Generator.load(folder, which="3")) == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="'5'"):
        Generator.load(folder, which="5")


def test_any_mesh_gives_the_same_text(folder: Path) -> None:
    one = Generator.load(folder)
    assert len(one.params["embed"]["weight"].devices()) == 1
    spread = Generator.load(folder, mesh=Mesh(data=1, fsdp=2, tensor=2))
    weight = spread.params["embed"]["weight"]
    assert weight.addressable_shards[0].data.size * 4 == weight.size
    a, b = (g.generate([PROMPT], GREEDY, max_new_tokens=8)[0].ids for g in (one, spread))
    assert a == b


def test_a_mesh_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"kv_heads 2 is not divisible by mesh\.tensor 4"):
        Generator.load(folder, mesh=Mesh(data=1, tensor=4))
    with pytest.raises(UserError, match="takes 512 devices"):
        Generator.load(folder, mesh=Mesh(data=512))
    assert jax.device_count() >= 4


def test_the_command_line_prints_the_text_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["sample", str(folder), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"]
    assert main([*args, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert main(args) == 0
    assert capfd.readouterr().out == record["text"] + "\n"
    prompt = [ByteTokenizer().control["<|bos|>"], *b"ab"]
    made = Generator.load(folder).generate([prompt], GREEDY, max_new_tokens=8)[0]
    assert (record["ids"], record["text"]) == (made.ids, made.text)
    assert main([*args, "--top-p", "7"]) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and "top_p is 7.0" in captured.err
