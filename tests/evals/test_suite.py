"""Suites: answers are those of the sampler, in the samples' order; scores are saved, used again, compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ONE, mesh, sharp_params
from tiny_evals import COMPUTE, MODEL, save_run

from jaxgpt.config import Suite
from jaxgpt.data.readers.tasks import evaluation_samples, question
from jaxgpt.errors import UserError
from jaxgpt.evals.command import evaluate
from jaxgpt.evals.metrics import metric_of
from jaxgpt.evals.perturb import PERTURBATIONS
from jaxgpt.evals.robust import suite_robustness
from jaxgpt.evals.suite import answers, predict, run_suite
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import load_trained
from jaxgpt.tasks import Translation
from jaxgpt.text.tokenizer import ByteTokenizer

PLAIN = {"prompts": ("{text}",), "held_out": "{text}=", "tokenizer": "byte", "template": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pairs.tsv").write_text(
        "".join(f"{w}\t{w[::-1]}\n" for w in ("abc", "d", "efghij", "kl", "mn", "o"))
    )
    return folder


@pytest.fixture(scope="module")
def task(folder: Path) -> Translation:
    files = (str(folder / "pairs.tsv"),)
    return Translation(
        train=files, test=files, into="back", max_new_tokens=4, metrics=("chrf", "perplexity"), **PLAIN
    )


@pytest.fixture(scope="module")
def run(folder: Path, task: Translation) -> Path:
    return save_run(folder / "run", task)


def test_answers_come_in_the_order_of_the_samples(task):
    """Though batches are made by length: each is what the prompt alone gives."""
    generator = Generator(MODEL, COMPUTE, sharp_params(MODEL), ByteTokenizer(), mesh=mesh(ONE))
    samples = [sample for _, sample in evaluation_samples(task)]
    asked = [question(task, sample, task.held_out) for sample in samples]
    made = answers(generator, task, asked, batch_size=2)
    for turns, one in zip(asked, made, strict=True):
        alone = generator.generate(
            **generator.texts([turns[-1]["content"]], bos=True),
            decoding=task.decoding,
            max_new_tokens=4,
            apart=True,
        )
        assert alone[0].ids == one.ids


def test_a_prompt_without_room_is_not_answered_and_said(task, caplog):
    generator = Generator(MODEL, COMPUTE, sharp_params(MODEL), ByteTokenizer(), mesh=mesh(ONE))
    long, short = ([{"role": "user", "content": "x" * n}] for n in (99, 2))
    made = answers(generator, task, [long, short])
    assert made[0].text == "" and len(made[1].ids) == 4
    assert "1 of 2 prompts of en-back leave no room" in caplog.text


def test_likelihoods_are_those_of_the_answer_and_its_end(run, task):
    """The perplexity of references is that of the validation loss, since both are of the same targets."""
    from jaxgpt.evals.loss import loss_of

    trained = load_trained(run)
    suite = Suite(name="s", tasks=(task,), resamples=50)
    (scores,) = run_suite(trained, suite)
    whole = replace(task, validation=task.test)
    loss = loss_of(trained, whole, batch_size=4)["loss"]
    assert scores.figures["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores.figures["chrf"].low <= scores.figures["chrf"].value <= scores.figures["chrf"].high


def test_the_command_saves_predictions_and_uses_them_again(run, task, folder, capsys, caplog):
    (folder / "suite.py").write_text(
        f"from jaxgpt.config import Suite\nfrom jaxgpt.tasks import Translation\n"
        f"def config():\n    return Suite(name='rev', resamples=50, tasks=({task!r},))\n".replace(
            "Sampling(", "__import__('jaxgpt.config').config.Sampling("
        )
    )
    evaluate(str(run), suite=str(folder / "suite.py"), against=str(run), json=True)
    first, against = (
        json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")
    )
    lines = (run / "eval" / "suite-rev-en-back.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["sample"]["answers"] == ["cba"]
    assert first["figures"]["chrf"]["signature"].startswith("nrefs:1")
    assert against["figures"]["chrf_difference"]["value"] == 0 and against["figures"]["chrf_p"]["value"] == 1
    caplog.set_level("INFO")
    evaluate(str(run), suite=str(folder / "suite.py"), json=True)
    assert json.loads(capsys.readouterr().out)["figures"] == first["figures"]
    assert "used again" in caplog.text


def test_metrics_that_need_likelihoods_need_a_scorer(task):
    generator = Generator(MODEL, COMPUTE, sharp_params(MODEL), ByteTokenizer(), mesh=mesh(ONE))
    with pytest.raises(UserError, match="likelihoods"):
        predict(generator, None, task, [])
    assert metric_of("perplexity").needs == "reference"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"tasks": ()}, "suite.tasks is empty"),
        ({"name": "a b"}, "suite.name"),
        ({"names": ("a", "b")}, "suite.names"),
    ],
)
def test_mistakes_in_a_suite(parts, words, task):
    with pytest.raises(UserError, match=words):
        Suite(**({"name": "s", "tasks": (task,)} | parts))


def test_references_beyond_the_context_are_cut_and_said(run, task, tmp_path, caplog):
    (tmp_path / "long.tsv").write_text("ab\t" + "x" * 99 + "\n")
    long = replace(task, test=(str(tmp_path / "long.tsv"),), metrics=("perplexity",))
    (scores,) = run_suite(load_trained(run), Suite(name="s", tasks=(long,), resamples=0))
    assert scores.predictions[0].reference[1] == MODEL.context
    assert "1 of 1 answers of en-back are longer" in caplog.text


def test_a_suite_under_disturbance(run, task):
    """Each drop is the difference of the metric of the same samples; other ways to ask are tried too."""
    wider = replace(task, prompts=("{text}", "say {text}"), held_out="{text}\nback=", metrics=("chrf",))
    trained = load_trained(run)
    ((name, found),) = suite_robustness(trained, Suite(name="s", tasks=(wider,)))
    kinds = [drop.name for drop in found.drops]
    assert name == "en-back" and kinds == [*PERTURBATIONS, "way to ask 1", "way to ask 2", "prompt order"]
    (scores,) = run_suite(trained, Suite(name="s", tasks=(wider,), resamples=0))
    assert found.drops[0].clean == pytest.approx(scores.figures["chrf"].value)
    (other,) = run_suite(
        trained,
        Suite(name="s", tasks=(replace(wider, prompts=("{text}",), held_out="say {text}"),), resamples=0),
    )
    asked = found.drops[kinds.index("way to ask 2")]
    assert asked.disturbed == pytest.approx(other.figures["chrf"].value)
    assert asked.drop.value == pytest.approx(asked.clean - asked.disturbed)


def test_a_run_of_tasks_is_scored_by_its_own(run, capsys):
    evaluate(str(run), json=True, limit=3)
    parts = [json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    assert [part["title"].split(",")[0] for part in parts] == [
        "The run's own validation dialogues",
        "en-back of the suite own",
    ]


def suite_file(folder: Path, body: str) -> str:
    path = folder / "suite.py"
    path.write_text(
        "from pathlib import Path\nfrom jaxgpt.config import Suite, code\nfrom jaxgpt.tasks import *\n"
        f"PLAIN = {PLAIN!r} | dict(max_new_tokens=2)\n"
        f"def config():\n    return Suite(name='odd', resamples=0, tasks=({body}))\n"
    )
    return str(path)


def test_tasks_whose_results_would_share_a_file(task):
    with pytest.raises(UserError, match="not all different in names of files"):
        Suite(name="s", tasks=(task, task), names=("a/b", "a-b"))


def test_answers_that_were_not_saved_whole_are_not_used(run, folder, tmp_path, monkeypatch, caplog):
    """Cut off while its predictions are written, a result stands beside no others."""
    body = f"Translation(test=('{folder}/pairs.tsv',), into='back', **PLAIN),"
    evaluate(str(run), suite=suite_file(tmp_path, body), json=True)

    def cut_off(*parts):
        raise KeyboardInterrupt

    other = body.replace("into='back'", "into='back', held_out='{text}?'").replace("**PLAIN", "**REST")
    other = suite_file(tmp_path, other)
    Path(other).write_text(
        Path(other)
        .read_text()
        .replace("def config", "REST = {k: v for k, v in PLAIN.items() if k != 'held_out'}\ndef config")
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxgpt.evals.command.write_jsonl", cut_off)
        evaluate(str(run), suite=other, json=True)
    caplog.set_level("INFO")
    evaluate(str(run), suite=other, json=True)
    assert "used again" not in caplog.text
    evaluate(str(run), suite=other, json=True)
    assert "used again" in caplog.text


def test_every_task_is_read_before_one_is_answered(run, folder, tmp_path, monkeypatch):
    """A mistake in the second is told at once, not after the first one's answers."""
    body = (
        f"Translation(test=('{folder}/pairs.tsv',), into='back', **PLAIN), "
        f"Translation(test=('{tmp_path}/gone.tsv',), into='back', **PLAIN)"
    )
    monkeypatch.setattr("jaxgpt.evals.suite.predict", lambda *_, **__: pytest.fail("it answered"))
    with pytest.raises(UserError, match=r"gone.tsv does not exist"):
        evaluate(str(run), suite=suite_file(tmp_path, body))


def test_answers_are_not_used_again_of_other_files_or_code(run, tmp_path, caplog):
    """Though the config is the same: a file behind a glob has changed, or how answers are read."""
    (tmp_path / "a.tsv").write_text("ab\tba\n")
    (tmp_path / "own.py").write_text(OWN_TASK)
    body = (
        f"code.run_file(Path('{tmp_path}/own.py'), FRESH)"
        f".Own(test=('{tmp_path}/*.tsv',), into='back', **PLAIN),"
    )
    caplog.set_level("INFO")
    found = []
    for change in (None, None, ("b.tsv", "c\td\n"), ("own.py", OWN_TASK.replace("'x'", "'xy'"))):
        if change:
            (tmp_path / change[0]).write_text(change[1])
        caplog.clear()
        evaluate(
            str(run), suite=suite_file(tmp_path, body.replace("FRESH", repr(str(len(found))))), json=True
        )
        found.append("used again" in caplog.text)
    assert found == [False, True, False, False]


OWN_TASK = """
from dataclasses import dataclass
from jaxgpt.tasks import Translation

@dataclass(frozen=True, kw_only=True)
class Own(Translation):
    def extract(self, text, sample):
        return 'x'
"""


def test_a_suite_takes_metrics_of_its_users_file(run, folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def letters(p):\n    return len(p.sample.answers[0])\n")
    given = f"test=('{folder}/pairs.tsv',), into='back', metrics=('{tmp_path}/mine.py:letters',)"
    body = f"Translation({given}, **PLAIN),"
    evaluate(str(run), suite=suite_file(tmp_path, body), json=True)
    (figure,) = json.loads(capsys.readouterr().out)["figures"].values()
    assert figure["value"] == pytest.approx((3 + 1 + 6 + 2 + 2 + 1) / 6)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"robust": True, "forgetting": "b"}, "--robust and --forgetting are measured one at a time"),
        ({"sentiment": "b"}, "--safety-limits and --sentiment are for --safety"),
        ({"robust": True, "suite": "s.py", "against": "b"}, "--against has no part in --robust"),
        ({"suite": "s.py", "stride": 2}, "--stride is for perplexities"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(run, parts, words):
    with pytest.raises(UserError, match=words):
        evaluate(str(run), **parts)
