"""`jaxgpt label` and `jaxgpt select`: self-training and active selection, as one command each.

jax is imported only once a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.alive import alive
from jaxgpt.config import ONE_DEVICE, Labelled, Mesh, Tagged, load_run
from jaxgpt.config.bounds import Bounds, Rows, Steps, StepsOr0, bounded
from jaxgpt.errors import UserError, require
from jaxgpt.evals import few_labels
from jaxgpt.evals.predict_command import File, Folder, named_file, predicted
from jaxgpt.evals.predict_files import Source, read_source
from jaxgpt.files import require_writable, write_jsonl, write_text
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    import numpy as np

    from jaxgpt.sample.load import Trained

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@bounded
def label(
    run: Folder,
    file: File,
    *,
    out: str,
    above: Annotated[float, Bounds(0, 1)] = 0.9,
    most: StepsOr0 = 0,
    balance: Switch = False,
    field: str = "",
    checkpoint: str = "best",
    verify: Verify = True,
    batch_size: Rows = 32,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Let a trained tagger or classifier label unlabelled texts, and keep those that it is sure of.

    The next run names the file in `data.train` beside the labelled one (self-training: Lee 2013). Texts of
    the run's own files and repeated ones are left out. Confidence is the probability of the label, of a
    sentence the lowest of its tags; `jaxgpt eval RUN --fit-temperature` makes it mean what it says. It stands
    beside the label, as does which model gave it.

    Args:
      run: folder of the run.
      file: unlabelled texts: as for `jaxgpt predict`; labels in it are only compared with.
      out: file to write: .jsonl (which keeps other fields of JSON lines) or .tsv; of a tagger a column file
        of any name.
      above: least confidence of a text that is kept.
      most: keep at most so many, the surest; 0 keeps all.
      balance: keep as many of each label, as many as the rarest has; not of taggers.
      field: field or column of the text; by default `data.text` of the run, or `text`.
      checkpoint: `best` on validation data, `newest`, or a step number.
      batch_size: rows per batch.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that tells no labels apart, or a file that cannot be read or written.
    """
    require(
        not balance or isinstance(_labels(run), Labelled), "--balance is for one label per text; drop it."
    )
    trained, source, records, known = _predict(run, file, out, field, checkpoint, verify, batch_size, mesh)
    keys = _keys(trained, source, records)
    found = few_labels.take_confident(keys, records, above, most, balance, known)
    print(
        f"{len(found.places)} of {len(records)} texts are labelled with a confidence of at least {above:g}; "
        "left "
        f"out: {found.unsure} less sure, {found.known} that the run's files have, {found.repeated} repeated, "
        f"{found.over} more than asked for",
        file=sys.stderr,
    )
    if found.counts:
        assert trained.run.task is not None
        counts = ", ".join(f"{name} {found.counts[name]}" for name in trained.run.task.labels)
        print(f"labels: {counts}", file=sys.stderr)
    golds = [i for i in found.places if source.texts[i].gold]
    if golds:
        made = [records[i].get("label", records[i].get("tags")) for i in golds]
        right = sum(source.texts[i].gold == label for i, label in zip(golds, made, strict=True)) / len(golds)
        print(f"{len(golds)} of those kept have a label in the file: {right:.1%} agree", file=sys.stderr)
    require(
        bool(found.places),
        f"no text is sure enough for --above {above:g}, so {out} is not written; lower it.",
    )
    _write(out, trained, source, records, found.places, f"{trained.folder.name}, step {trained.step}")


@bounded
def select(
    run: Folder,
    file: File,
    *,
    out: str,
    count: Steps = 100,
    by: few_labels.By = "entropy",
    diverse: Switch = False,
    field: str = "",
    checkpoint: str = "best",
    verify: Verify = True,
    batch_size: Rows = 32,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write the texts that a trained tagger or classifier is least certain of, for a person to label.

    In the file, the label is empty (of a tagger, the tags are those predicted, to be corrected), and what was
    predicted and its confidence stand beside it. Filled in, it is training data of the next run.

    Args:
      run: folder of the run.
      file: unlabelled texts: as for `jaxgpt predict`.
      out: file to write: .jsonl (which keeps other fields of JSON lines) or .tsv; of a tagger a column file
        of any name.
      count: number of texts.
      by: measure of uncertainty: entropy of the labels, margin between the two likeliest, or one minus the
        likeliest's probability (the one for taggers).
      diverse: of ten times as many uncertain texts, choose those whose embeddings lie far from each other.
      field: field or column of the text; by default `data.text` of the run, or `text`.
      checkpoint: `best` on validation data, `newest`, or a step number.
      batch_size: rows per batch.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that tells no labels apart, or a file that cannot be read or written.
    """
    if isinstance(_labels(run), Tagged):
        require(by != "margin", "--by is 'margin', which a tagger has not; use least-confidence.")
        by = "least-confidence"
    trained, source, records, known = _predict(run, file, out, field, checkpoint, verify, batch_size, mesh)
    keys = _keys(trained, source, records)

    def features(places: list[int]) -> np.ndarray:
        return _features(trained, [source.texts[i].text for i in places])

    places = few_labels.most_uncertain(keys, records, by, count, known, features if diverse else None)
    require(bool(places), f"all texts of {file} are in the run's own files already; name others.")
    values, own = [few_labels.uncertainty(records[i], by) for i in places], sum(key in known for key in keys)
    print(
        f"{len(places)} of {len(records)} texts, {own} of which are in the run's own files; {by} "
        f"{min(values):.3f} to {max(values):.3f}",
        file=sys.stderr,
    )
    _write(out, trained, source, records, places)


def _labels(run: str) -> Labelled | Tagged:
    data = load_run(run).data
    if not isinstance(data, Tagged | Labelled):
        raise UserError(f"{run} tells no labels apart; give the run of a Classifier.")
    return data


def _predict(
    run: str, file: str, out: str, field: str, checkpoint: str, verify: bool, batch_size: int, mesh: Mesh
) -> tuple[Trained, Source, list[dict[str, Any]], set[str]]:
    """The run, the file's texts, what is predicted of each, and the keys of those in the run's own files."""
    data = _labels(run)
    if isinstance(data, Labelled):
        ending = Path(out).suffix.lower()
        require(ending in (".jsonl", ".tsv"), f"--out is {out!r}; name a .jsonl or a .tsv file.")
    with named_file(file) as path:
        source = read_source(path, data, None, field)
        same = Path(out).resolve() == Path(path).resolve()
        require(not same, f"--out is the input {out}; name another.")
    files = {Path(name).resolve() for name in (*data.train, *data.validation, *data.test)}
    require(Path(out).resolve() not in files, f"--out is {out}, which the run learns from; name another.")
    require_writable(Path(out).parent)
    known = _known(data)
    from jaxgpt.sample.load import load_trained

    trained = load_trained(run, which=checkpoint, mesh=mesh, verify=verify)
    with alive("predicting"):
        return trained, source, predicted(trained, source, batch_size), known


def _known(data: Labelled | Tagged) -> set[str]:
    try:
        return few_labels.known_texts(data)
    except UserError as error:  # a run's folder may have been moved away from its data
        print(
            f"texts that the run has labels of are not left out, since they are not here: {error}",
            file=sys.stderr,
        )
        return set()


def _keys(trained: Trained, source: Source, records: list[dict[str, Any]]) -> list[str]:
    data = trained.run.data
    if isinstance(data, Tagged):
        return [few_labels.key_of(record["words"], data.joiner) for record in records]
    return [few_labels.key_of(given.text) for given in source.texts]


def _features(trained: Trained, texts: list[Any]) -> np.ndarray:
    import numpy as np

    from jaxgpt.evals.features import Wanted, observe
    from jaxgpt.sample.encode import reading_ids

    joiner = getattr(trained.run.data, "joiner", " ")
    ids = [reading_ids(trained, text if isinstance(text, str) else joiner.join(text)) for text in texts]
    rows = [row[: trained.run.length] for row in ids]
    return np.stack([found["embedding"] for found in observe(trained, rows, Wanted(pooling="mean"))])


def _write(
    out: str, trained: Trained, source: Source, records: list[dict[str, Any]], places: list[int], by: str = ""
) -> None:
    """Write what was chosen; `by` names the model that gives the labels, empty where a person shall."""
    import jax

    if jax.process_index() > 0:  # every process finds the same
        return
    chosen, data = [records[i] for i in places], trained.run.data
    if isinstance(data, Tagged):
        lines = few_labels.column_lines(chosen, [record["words"] for record in chosen])
        write_text(Path(out), "\n".join(lines) + "\n")
    else:
        assert isinstance(data, Labelled)
        given = [source.texts[i] for i in places]
        own = [one.own if isinstance(one.own, dict) else {} for one in given]
        texts = [one.text for one in given]
        made, lines = few_labels.written(data, texts, chosen, Path(out).suffix.lower(), by, own)
        write_jsonl(Path(out), made) if made else write_text(Path(out), "\n".join(lines) + "\n")
    print(f"saved as {out}", file=sys.stderr)
