"""`jaxgpt data show`, and how long the data commands take to say what they do."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from jaxgpt.data.prepare import prepare
from jaxgpt.data.show import show
from jaxgpt.text.tokenizer import ByteTokenizer

HEAD = """from jaxgpt.config import *
small = GPT(layers=1, width=8, heads=1, vocab_size=264, context=96)
"""


@pytest.fixture
def chat_config(tmp_path):
    record = {"messages": [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "uno 一"},
        {"role": "user", "content": "two?"}, {"role": "assistant", "content": "dos"},
    ]}  # fmt: skip
    others = [
        {"messages": [*record["messages"][:1], {"role": "assistant", "content": str(i)}]} for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [record, *others])))
    (tmp_path / "v.jsonl").write_text(json.dumps(record))
    ByteTokenizer().save(tmp_path / "tok")
    names = [str(tmp_path / name) for name in ("a.jsonl", "v.jsonl", "tok")]
    data = "Chat(train=({!r},), validation=({!r},), tokenizer={!r})".format(*names)
    (tmp_path / "c.py").write_text(f"{HEAD}def config(): return Run(name='a', model=small, data={data})\n")
    return str(tmp_path / "c.py")


def test_json_shows_answers_and_their_ends_as_trained(chat_config, capsys):
    show(chat_config, n=3, json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(r) for r in rows] == [{"text", "tokens", "weights", "segments"}] * 3
    tokenizer, answers = ByteTokenizer(), set()
    end = tokenizer.control["<|end|>"]
    for row in rows:
        assert len(row["tokens"]) == len(row["weights"]) == len(row["segments"])
        trained, given = [], []
        for token, weight in zip(row["tokens"], row["weights"], strict=True):
            (trained if weight else given).append(token)
        assert b"?" not in bytes(t for t in trained if t < 256)
        assert b"one" in bytes(t for t in given if t < 256)
        answers |= {tokenizer.decode(part) for part in split(trained, end)}
        assert trained[-1] == end
        assert row["text"].startswith("<|bos|><|user|>one?<|end|><|assistant|>")
    assert answers <= {"uno 一", "dos", *map(str, range(9))}
    assert len(answers) > 5


def split(tokens, end):
    part = []
    for token in tokens:
        if token == end:
            yield part
            part = []
        else:
            part.append(token)
    assert not part


def test_marks_in_a_pipe_are_the_mask(chat_config, capsys):
    """Between the marks stands what has weight, and nothing else."""
    show(chat_config, n=3)
    legend, *lines = capsys.readouterr().out.splitlines()
    assert legend == "Trained tokens are between {+ and +}; the others are only read."
    marked = re.findall(r"\{\+(.*?)\+\}", "\n".join(lines), re.DOTALL)
    assert {"uno 一<|end|>", "dos<|end|>", "3<|end|>"} <= set(marked)
    assert "<|user|>one?<|end|><|assistant|>{+" in "\n".join(lines)
    show(chat_config, n=3, json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = ByteTokenizer()
    trained = [t for row in rows for t, w in zip(row["tokens"], row["weights"], strict=True) if w]
    names = tokenizer.names
    pieces = [names[t].encode() if t in names else tokenizer.piece_bytes(t) for t in trained]
    assert "".join(marked) == b"".join(pieces).decode()


def test_a_terminal_has_colours_and_no_marks(chat_config, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(chat_config, n=1)
    out = capsys.readouterr().out
    assert "{+" not in out and "\x1b[" in out and "bold green" in out
    monkeypatch.setenv("NO_COLOR", "1")
    show(chat_config, n=1)
    assert "{+" in capsys.readouterr().out


def test_text_rows_show_documents(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("all the world is a stage " * 50)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", split="tail", workers=1)
    data = f"Text(path={str(tmp_path / 'out')!r})"
    (tmp_path / "c.py").write_text(f"{HEAD}def config(): return Run(name='a', model=small, data={data})\n")
    show(str(tmp_path / "c.py"), n=1, json=True)
    row = json.loads(capsys.readouterr().out)
    assert row["text"].replace("<|bos|>", "").replace("<|eos|>", "") in "all the world is a stage " * 99
    assert row["weights"][0] == 0
    assert sum(row["weights"]) >= 90


def test_labels_stand_beside_the_words_that_they_are_of(tmp_path, capsys):
    (tmp_path / "a.bio").write_text("Éva B-PER\nsaw O\nParis B-LOC\n\n")
    data = "Tagged(train=({0!r},), validation=({0!r},), tokenizer='byte')".format(str(tmp_path / "a.bio"))
    model = "Classifier(backbone=small, labels=('O', 'B-PER', 'B-LOC'))"
    run = f"Run(name='a', model={model}, data={data}, objective=Classification())"
    (tmp_path / "c.py").write_text(f"{HEAD}def config(): return {run}\n")
    show(str(tmp_path / "c.py"), n=1)
    assert "<|bos|>Éva[B-PER] saw Paris[B-LOC]<|eos|>" in capsys.readouterr().out
    (tmp_path / "d.py").write_text(
        (tmp_path / "c.py").read_text().replace("tokenizer=", "align='first', tokenizer=")
    )
    show(str(tmp_path / "d.py"), n=1)
    assert "<|bos|>[B-PER]Éva saw[B-LOC] Paris<|eos|>" in capsys.readouterr().out
    show(str(tmp_path / "c.py"), n=1, json=True)
    row = json.loads(capsys.readouterr().out)
    assert [label for label in row["labels"] if label] == ["B-PER", "O", "B-LOC"]
    assert sum(row["weights"]) == 3


def test_the_commands_do_not_import_jax():
    modules = [f"data.{m}" for m in ("prepare", "train_tokenizer", "show", "corpus", "packing", "readers")]
    code = "import sys\n" + "".join(f"import jaxgpt.{m}\n" for m in [*modules, "text.hf_tokenizer"])
    code += "sys.exit(bool({'jax', 'grain'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
