"""Pretraining text: a folder that `jaxgpt data prepare` wrote, as rows."""

from __future__ import annotations

from pathlib import Path

from jaxgpt.config import Classifier, Text
from jaxgpt.data.corpus import Corpus, read_manifest
from jaxgpt.data.packing import ConcatRows, Rows, StreamRows
from jaxgpt.errors import require
from jaxgpt.text.tokenizer import Tokenizer


def tokenizer_of(data: Text) -> str:
    """The folder of the tokenizer that the text was prepared with; `UserError` where nothing was."""
    read_manifest(data.path)
    return str(Path(data.path) / "tokenizer")


def rows(
    data: Text,
    tokenizer: Tokenizer,
    length: int,
    seed: int | None,
    batch_size: int,
    task: Classifier | None,
) -> Rows:
    """Its documents cut into rows, or into one stream for each row of the batch; see `data.readers.Reader`.

    Raises:
      UserError: it was prepared with another tokenizer, or fills no row.
    """
    corpus = Corpus(data.path, "validation" if seed is None else "train")
    held = corpus.manifest["tokenizer"]["digest"]
    require(
        held == tokenizer.digest,
        f"{data.path} was prepared with another tokenizer (digest {held[:12]}, the run's is "
        f"{tokenizer.digest[:12]}); prepare it again with --tokenizer set to the run's.",
    )
    pad = tokenizer.control["<|pad|>"]
    if data.contiguous:
        return StreamRows(corpus, length, batch_size, seed, pad)
    return ConcatRows(corpus, length, seed, pad)
