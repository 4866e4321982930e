"""`Run.replay`: earlier data as sources of a mixture, in their share of the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jaxgpt.config import Chat, Labelled, Mix, Replay, Run, Text, from_json, to_json
from jaxgpt.errors import UserError
from jaxgpt.files import write_json

OWN = Chat(train=("new/a.jsonl",), tokenizer="byte", length=16, workers=2)


def test_data_become_a_mixture_that_the_config_shows() -> None:
    run = Run(name="r", data=OWN, replay=Replay(data=Text(path="old/wiki"), share=0.25))
    assert run.replay is None
    assert run.data == Mix(
        sources=(replace(OWN, length=None, workers=0), Text(path="old/wiki")),
        weights=(0.75, 0.25),
        names=("a", "replay-wiki"),
        length=16,
        workers=2,
    )
    assert from_json(Run, to_json(run)) == run == replace(run, name="r")  # not mixed once more


def test_a_mixture_keeps_the_shares_among_its_sources(tmp_path: Path) -> None:
    old = Run(name="old", data=Mix(sources=(Text(path="x"), Text(path="y")), weights=(1, 3)))
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "config.json", {"run": to_json(old)})
    run = Run(name="r", data=OWN, replay=Replay(run=str(tmp_path / "old"), share=0.2))
    assert isinstance(run.data, Mix)
    assert run.data.weights == pytest.approx((0.8, 0.05, 0.15))
    assert run.data.source_names == ("a", "replay-x", "replay-y")


@pytest.mark.parametrize(
    ("replay", "words"),
    [
        (lambda: Replay(), "name a run or"),
        (lambda: Replay(data=Mix(sources=(Text(path="x"), Text(path="y")))), "give it weights"),
        (lambda: Replay(run="nowhere"), "replay.run 'nowhere' is no run folder"),
    ],
)
def test_what_cannot_be_replayed_is_refused(replay, words) -> None:
    with pytest.raises(UserError, match=words):
        Run(name="r", data=OWN, replay=replay())


def test_labels_are_not_mixed() -> None:
    with pytest.raises(UserError, match="Labelled"):
        Run(name="r", data=Labelled(train=("a",), validation=("b",)), replay=Replay(data=Text(path="x")))
