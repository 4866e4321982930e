"""`jaxgpt eval RUN --forgetting BASE`: what is lost is the difference of two ordinary evaluations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny import sharp_params
from tiny_evals import MODEL, ROWS, save_run

from jaxgpt.config import Chat, Mix, Text, load
from jaxgpt.errors import UserError
from jaxgpt.evals.command import evaluate
from jaxgpt.evals.loss import validation_loss
from jaxgpt.tasks import Translation


@pytest.fixture(scope="module")
def runs(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of text and a task, and a run of other data and other parameters."""
    folder = tmp_path_factory.mktemp("forgetting")
    (folder / "pairs.tsv").write_text("".join(f"{w}\t{w[::-1]}\n" for w in ("abc", "d", "ef", "kl")))
    files = (str(folder / "pairs.tsv"),)
    task = Translation(
        train=files, validation=files, into="back", prompts=("{text}",), held_out="{text}=", tokenizer="byte",
        template="none", max_new_tokens=2, metrics=("chrf",),
    )  # fmt: skip
    text = load(text_run).data
    assert isinstance(text, Text)
    base = save_run(folder / "base", Mix(sources=(text, task), weights=(1, 1), names=("text", "back")))
    other = jax.tree.map(lambda a: 0.7 * a, sharp_params(MODEL))
    chat = Chat(train=files, prompt="a", completion="b", tokenizer="byte", template="none")
    return base, save_run(folder / "later", chat, params=other)


def test_what_is_forgotten_is_the_difference_on_the_earlier_data(runs: tuple[Path, Path]) -> None:
    base, later = runs
    evaluate(str(later), forgetting=str(base), batch_size=ROWS)
    read = lambda name: {  # noqa: E731
        key: figure["value"]
        for key, figure in json.loads((later / "eval" / f"{name}.json").read_text())["figures"].items()
    }
    data = load(base).data
    assert isinstance(data, Mix)
    for name, source in zip(("text", "back"), data.sources, strict=True):
        found, alone = read(f"forgetting-base-{name}"), replace(source, length=32)
        for key in ("bits_per_byte", "loss", "accuracy"):
            before, after = (validation_loss(run, alone, batch_size=ROWS)[key] for run in runs)
            expected = {f"{key}_before": before, key: after, f"{key}_difference": after - before}
            assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(read("suite-forgetting-base-en-back-against-base")) >= {"chrf_difference"}


def test_it_is_asked_for_by_itself(runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="--forgetting is by itself"):
        evaluate(str(runs[1]), forgetting=str(runs[0]), text=("a.txt",))
