"""`jaxgpt predict RUN FILE`: labels of new texts by a tagger or a classifier.

jax is imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxgpt.alive import alive
from jaxgpt.config import ONE_DEVICE, Labelled, Mesh, Tagged, load_run
from jaxgpt.config.bounds import Rows, bounded
from jaxgpt.data.sources import expand
from jaxgpt.errors import UserError, require
from jaxgpt.evals.predict_files import Source, json_lines, own_lines, read_source
from jaxgpt.files import require_writable, write_text
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    from jaxgpt.sample.load import Trained

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


@bounded
def predict(
    run: Folder,
    file: File,
    *,
    out: str = "",
    format: Literal["auto", "jsonl", "own"] = "auto",  # noqa: A002
    input: Literal["auto", "jsonl", "table", "columns", "lines"] = "auto",  # noqa: A002
    field: str = "",
    ensemble: tuple[str, ...] = (),
    checkpoint: str = "best",
    verify: Verify = True,
    batch_size: Rows = 32,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Label new texts with a trained tagger or classifier; every label has its probability as its score.

    A JSON line holds, of a tagger, `text`, `spans` (start, end, label, score, text; the characters are
    text[start:end], the score is the product over the words), and `words`, `tags` and `scores` of every word;
    of a classifier `text`, `label`, `score` and `scores` of all labels. Labels that the input has are `gold`.

    Args:
      run: folder of the run.
      file: .jsonl, .csv or a text per line; for a tagger also column files (one word per line, with or
        without tags) and JSON lines with a list of `words`; for a classifier also .tsv, with or without
        labels. `-` reads lines from standard input.
      out: file to write; by default standard output.
      format: of the output: JSON lines, or the input's own with columns for score and label; auto takes the
        input's own where --out has the same ending, else JSON lines.
      input: what the file is; auto tells by its ending, and of a .txt file by its lines.
      field: field or column of the text; by default `data.text` of the run, or `text`.
      ensemble: further runs of the same labels and tokenizer, whose probabilities are averaged.
      checkpoint: `best` on validation data, `newest`, or a step number.
      batch_size: rows per batch.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that tells no labels apart, or a file that cannot be read or written.
    """
    data = load_run(run).data
    if not isinstance(data, Tagged | Labelled):
        raise UserError(f"{run} tells no labels apart; give the run of a Classifier, or use `jaxgpt sample`.")
    with named_file(file) as path:
        source = read_source(path, data, None if input == "auto" else input, field)
        require(
            not out or Path(out).resolve() != Path(path).resolve(), f"--out is the input {out}; name another."
        )
    if out:
        require_writable(Path(out).parent)
    import jax

    from jaxgpt.sample.load import load_trained

    trained = load_trained(run, which=checkpoint, mesh=mesh, verify=verify)
    if ensemble:
        from jaxgpt.evals.predict import ensemble as together

        trained = together(trained, [load_trained(one, mesh=mesh, verify=verify) for one in ensemble])
    with alive("predicting"):
        records = predicted(trained, source, batch_size)
    if jax.process_index() > 0:
        return
    own = format == "own" or (format == "auto" and out and _ending(out) == _ending(file))
    text = "".join(own_lines(source, records) if own else json_lines(source, records))
    if not out:
        sys.stdout.write(text)
        return
    write_text(Path(out), text)
    print(f"{len(records)} texts labelled: saved as {out}", file=sys.stderr)


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


@contextlib.contextmanager
def named_file(file: str) -> Iterator[str]:
    """The path of the one file that is meant; of standard input, a copy of it."""
    if file != "-":
        found = expand([file], ("",))
        require(len(found) == 1, f"{file} is {len(found)} files; give one at a time.")
        yield found[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard-input.txt"
        path.write_bytes(sys.stdin.buffer.read())
        yield str(path)


def predicted(trained: Trained, source: Source, batch_size: int) -> list[dict[str, Any]]:
    """What was predicted of each text, as JSON."""
    from jaxgpt.evals.predict import classify, label_record, tag, tagging_record

    texts, data = [given.text for given in source.texts], trained.run.data
    golds = [given.gold for given in source.texts]
    if isinstance(data, Tagged):
        written = [text if isinstance(text, str) else data.joiner.join(text) for text in texts]
        tagged = tag(trained, texts, batch_size, "predicting")
        return [tagging_record(*parts) for parts in zip(written, tagged, golds, strict=True)]
    labels = classify(trained, texts, batch_size, "predicting")
    return [label_record(*_pair(t), p, g) for t, p, g in zip(texts, labels, golds, strict=True)]


def _pair(text: str | Sequence[str]) -> tuple[str, str | None]:
    return (text, None) if isinstance(text, str) else (text[0], text[1])
