"""The file that docs/add-a-task.md builds trains, answers and is scored, as the page says."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from jaxgpt.cli import main
from jaxgpt.config import load
from jaxgpt.config.load import load_module
from jaxgpt.data.readers import run_tokenizer
from jaxgpt.data.readers.tasks import evaluation_samples
from jaxgpt.evals.metrics import Prediction, metric_of

PAGE = Path(__file__).parents[2] / "docs/add-a-task.md"
WORDS = [("hot", ["cold", "cool"]), ("big", ["small"]), ("up", ["down"]), ("wet", ["dry"]), ("old", ["new"])]
WORDS += [(f"in{i}", [f"out{i}"]) for i in range(40)]
TINY = (
    "--model.layers 1 --model.width 16 --model.heads 2 --train.steps 2 --train.batch-size 8 "
    "--train.log-every 1 --train.eval-every 2 --optim.warmup-steps 1 --data.validation-fraction 0.4 "
    "--compute.dtype float32 --data.length 96 --runs"
)


@pytest.fixture(scope="module")
def opposites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the page builds, beside its data."""
    folder = tmp_path_factory.mktemp("task")
    lines = [{"word": word, "opposites": right, "by": "a thesaurus"} for word, right in WORDS]
    chats = [{"prompt": f"Say {i}", "completion": f"{i}!"} for i in range(6)]
    for name, records in (("opposites", lines), ("dialogues", chats)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    text = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    (folder / "opposites.py").write_text(text.replace('"data/', f'"{folder}/'))
    return folder / "opposites.py"


def test_it_reads_its_files_and_asks_as_the_page_says(opposites: Path, caplog) -> None:
    task = load(opposites).data
    samples = {
        s.values["word"]: s for split in ("train", "validation") for _, s in evaluation_samples(task, split)
    }
    assert {word: s.answers for word, s in samples.items()} == {word: tuple(right) for word, right in WORDS}
    assert task.extract(" Cold.\n", samples["hot"]) == "cold"
    own = metric_of(task.metrics[1])
    said = [Prediction(samples["hot"], "", text, text) for text in ("cold", "warm", "chilly")]
    assert own.of(own.statistics(said)) == pytest.approx(2 / 3)  # two have as many letters
    assert f"not read, so that nothing of it is learned: field 'by' ({len(WORDS)})" in caplog.text


def test_it_trains_and_keeps_its_file(opposites: Path, tmp_path: Path) -> None:
    with redirect_stdout(StringIO()) as out:
        assert main(["data", "show", str(opposites), "--n", "1"]) == 0
    assert re.search(r"<\|user\|>.*(opposite|Opposite|contrary).*<\|assistant\|>\{\+", out.getvalue())
    assert main(["train", str(opposites), *TINY.split(), str(tmp_path)]) == 0
    folder = tmp_path / "opposites"
    assert json.loads((folder / "config.json").read_text())["run"]["data"]["kind"] == "opposites.py:Opposites"
    assert (folder / "code/opposites.py").read_bytes() == opposites.read_bytes()
    assert load(folder).data.metrics[1].endswith("code/opposites.py:same_length")


def test_a_mixture_of_it_has_a_loss_for_each_source(opposites: Path) -> None:
    from jaxgpt.data.loader import validation_parts

    run = load_module(opposites).several()
    assert run.data.source_names == ("opposites", "dialogue")
    parts = validation_parts(run.data, run_tokenizer(run), model_length=run.length, batch_size=2)
    assert all(len(part) > 0 for part in parts.values())
