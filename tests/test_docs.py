"""The code of the documents runs, and does what they say."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FLOAT32, HERE, T, make_run, packed, plain

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import Beam, CausalLM, Contrastive, code, load_run, to_json
from jaxgpt.config import load as load_config
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_model, flops_per_token, init_params, parameter_counts
from jaxgpt.objectives import causal_lm
from jaxgpt.text.vocabulary import Vocabulary

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def averager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that add-a-model.md builds, with tiny data and a sweep."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "a.txt").write_text("seven dogs ran over green hills and far away\n" * 60)
    prepare([str(folder / "a.txt")], folder / "text", validation=0.2, split="tail", workers=1)
    words = (DOCS / "add-a-model.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", words, re.DOTALL))
    assert "data/shakespeare" in code
    path = folder / "averager.py"
    path.write_text(code.replace("data/shakespeare", str(folder / "text")) + SWEEP)
    return path


SWEEP = """

def sweep():
    from dataclasses import replace

    base = config()
    yield "narrow", base
    yield "wide", replace(base, model=replace(base.model, width=32))
"""
TINY = (
    "--model.context 32 --train.steps 6 --train.batch-size 8 --train.log-every 1 --train.eval-every 3 "
    "--train.save-every 3 --train.eval-batches 1 --optim.warmup-steps 1 --optim.peak-lr 1e-2 "
    "--compute.dtype float32 --runs"
)


def command(*words: str | Path) -> str:
    """What a command prints; it must succeed."""
    with redirect_stdout(StringIO()) as out:
        parts = [[str(word)] if isinstance(word, Path) else word.split() for word in words]
        assert main([*chain(*parts)]) == 0
    return out.getvalue()


def test_the_model_of_add_a_model_is_used_by_every_command(averager: Path, tmp_path: Path) -> None:
    command("train", averager, TINY, tmp_path, "--train.steps 3 --name averager")
    folder = tmp_path / "averager"
    assert (folder / "code" / "averager.py").read_bytes() == averager.read_bytes()
    assert json.loads((folder / "config.json").read_text())["run"]["model"]["kind"] == "averager.py:Averager"
    moved = folder.rename(tmp_path / "elsewhere")
    assert "bits per byte" in command("eval", moved).lower()
    assert len(command("sample", moved, "--prompt seven --max-new-tokens 4")) > 1
    command("info", moved / "config.json")
    model = jaxgpt.load(moved)
    assert type(model.config.model).__name__ == "Averager" and "Averager" in repr(model)
    ids = model.encode("seven dogs")
    (logits_TV,) = model.logits([ids])
    assert logits_TV.shape == (len(ids), 264)
    first = model.generate("seven", max_new_tokens=3, temperature=0)
    (again_TV,) = model.logits([model.encode("seven") + first.ids])
    assert [int(row.argmax()) for row in again_TV[-4:-1]] == first.ids  # decoding equals the full forward
    beams = model.generate("seven", max_new_tokens=3, decoding=Beam(beams=3)).candidates
    told = model.score(["seven"] * 3, [beam.ids for beam in beams])
    assert [3 * (beam.score or 0) for beam in beams] == pytest.approx([total for total, _ in told], abs=1e-4)
    assert model.generate("seven", max_new_tokens=3, decoding=Contrastive(alpha=0)).ids == first.ids
    hidden = model.hidden(["seven dogs"])
    assert sorted(hidden) == [0, 1, 2] and hidden[1][0].shape == (len(ids), 64)
    assert model.embed(["seven", "dogs"]).shape == (2, 64)
    logprob, _ = model.score([ids[:5]], [ids[5:]])[0]
    of_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    assert logprob == pytest.approx(sum(of_TV[4 + i, token] for i, token in enumerate(ids[5:])), abs=1e-4)
    with pytest.raises(UserError, match="a Averager has no attention maps"):
        model.attention(["seven"])


def test_it_resumes_and_its_code_may_not_change_meanwhile(averager: Path, tmp_path: Path) -> None:
    command("train", averager, TINY, tmp_path, "--name whole")
    mine = tmp_path / "averager.py"
    mine.write_bytes(averager.read_bytes())
    command("train", mine, TINY, tmp_path, "--name again")
    for name in ("6", "best"):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / name, ignore_errors=True)
    mine.write_text(mine.read_text() + "\n# a comment\n")
    command("train", mine, TINY, tmp_path, "--name again")
    same = [jaxgpt.load(tmp_path / name, checkpoint="newest") for name in ("whole", "again")]
    assert same[0].step == same[1].step == 6
    jax.tree.map(np.testing.assert_array_equal, same[0].params, same[1].params)
    mine.write_text(mine.read_text().replace("jax.nn.sigmoid(self", "jax.nn.tanh(self"))
    with redirect_stderr(StringIO()) as said:
        assert main(["train", str(mine), *TINY.split(), str(tmp_path), "--name", "again"]) == 2
    assert "is not what" in said.getvalue()


def test_it_can_be_swept(averager: Path, tmp_path: Path) -> None:
    said = command("sweep", averager, TINY, tmp_path)
    assert "2 of 2 runs done" in said
    assert (tmp_path / "averager" / "wide" / "code" / "averager.py").is_file()


def test_code_of_somebody_elses_run_is_run_only_when_asked(
    averager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(code.TRUST, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "theirs"
    (run / "code").mkdir(parents=True)
    (run / "code" / "averager.py").write_text(
        averager.read_text() + "\nopen(__file__ + '.ran', 'w').close()\n"
    )
    model = {"kind": "averager.py:Averager"}
    held = to_json(make_run()) | {"model": model}
    (run / "config.json").write_text(json.dumps({"run": held}))
    with pytest.raises(UserError, match=r"model.kind is 'averager.py:Averager': .* --trust-code"):
        load_run(run)
    assert not list(run.glob("code/*.ran"))
    monkeypatch.setenv(code.TRUST, "1")
    assert type(load_run(run).model).__name__ == "Averager" and list(run.glob("code/*.ran"))
    monkeypatch.delenv(code.TRUST)
    with code.trusting(True):
        load_run(run)
    with pytest.raises(UserError, match="--trust-code"):  # it was for that one alone
        load_run(run)
    load_config(averager)  # the user's own file, once run, is trusted wherever it is copied
    (run / "code" / "averager.py").write_bytes(averager.read_bytes())
    assert load_run(run).model.width == 64
    for kind, words in (
        ("averager.py:Nothing", "defines no such config class"),
        ("b.py:X", "does not exist"),
    ):
        held["model"]["kind"] = kind
        (run / "config.json").write_text(json.dumps({"run": held}))
        with pytest.raises(UserError, match=words):
            load_run(run)


def test_the_walk_of_python_md(
    averager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (DOCS / "python.md").read_text("utf-8")
    walk = "\n".join(re.findall(r"```python\n(.*?)```", words, re.DOTALL))
    smaller = {
        "data/shakespeare": str(averager.parent / "text"),
        "steps=400, batch_size=16, eval_every=100": "steps=6, batch_size=8, eval_every=2",
        "layers=4, width=128": "layers=2, width=32",
        "warmup_steps=20": "warmup_steps=2",
    }
    for long, short in smaller.items():
        assert long in walk
        walk = walk.replace(long, short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    exec(compile(walk, "python.md", "exec"), {"__name__": "walk"})
    said = capsys.readouterr().out
    assert "<jaxgpt.Model 'runs/small': GPT" in said
    for picture in ("attention.png", "loss.png"):
        assert (tmp_path / picture).stat().st_size > 5000


def test_the_model_of_add_a_model_learns_and_looks_back_only(averager: Path) -> None:
    model = replace(load_config(averager).model, vocab_size=64, context=T, width=16)
    assert parameter_counts(model)["total"] == 64 * 16 + 2 * (3 * 16 + 2 * 4 * 16 * 16) + 16
    assert flops_per_token(model, T) > 0
    graphdef, _ = abstract_model(model, FLOAT32, HERE)
    params = init_params(model, FLOAT32, HERE, jax.random.key(0))
    objective = causal_lm(CausalLM(), Vocabulary.plain(64))
    batch = packed([(9, 7)] * 4)

    @jax.jit
    def step(params: dict) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            sums = objective(nnx.merge(graphdef, params), batch, None)
            return sums.loss / sums.weight

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    losses = []
    for _ in range(30):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.3

    @jax.jit
    def logits(tokens_BT: jax.Array) -> jax.Array:
        module = nnx.merge(graphdef, params)
        return module.logits(module.hidden(plain(tokens_BT)).x_BTD)

    tokens_BT = batch.tokens_BT
    moved = np.abs(np.asarray(logits(tokens_BT.at[:, 5].set(0)) - logits(tokens_BT))).max((0, 2)) > 1e-6
    assert not moved[:5].any() and moved[5:].all()
    packed_BTD = nnx.merge(graphdef, params).hidden(batch).x_BTD
    alone = jnp.pad(batch.tokens_BT[:, 9:], ((0, 0), (0, 9)))
    apart_BTD = nnx.merge(graphdef, params).hidden(plain(alone)).x_BTD
    np.testing.assert_allclose(packed_BTD[:, 9:], apart_BTD[:, :7], atol=1e-5)
