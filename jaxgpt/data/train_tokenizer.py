"""`jaxgpt tokenizer train`: a tokenizer from a bounded, evenly spread sample of text."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from jaxgpt.alive import alive
from jaxgpt.config.bounds import Bounds, Share, Tokens, bounded
from jaxgpt.data.documents import read_documents
from jaxgpt.data.sources import Sources, expand, total_size
from jaxgpt.errors import UserError, require
from jaxgpt.files import require_writable
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer, saved_meta
from jaxgpt.text.train import train_sentencepiece


def sample(sources: list[str], budget: int, field: str, max_bad: float) -> Iterator[str]:
    """About `budget` bytes of the sources' text, spread evenly over them, in one streaming pass."""
    files = expand(sources)
    share = min(1.0, budget / max(1, total_size(files)))
    for document in read_documents(files, field=field, max_bad=max_bad):
        for start in range(0, len(document), 1 << 16):
            piece = document[start : start + (1 << 16)]
            head = hashlib.blake2b(piece.encode(), digest_size=8).digest()
            if share >= 1 or int.from_bytes(head, "big") < share * 2**64:
                yield piece


def check_place(out: Path, model_type: str, vocab_size: int) -> None:
    """Refuse a folder that a tokenizer could not be saved into, before it is trained."""
    held = saved_meta(out) if out.is_dir() else None
    if held is None:
        require(
            not out.exists() or (out.is_dir() and not any(out.iterdir())),
            f"{out} exists and is not empty; a tokenizer is saved into a folder of its own.",
        )
    else:
        byte = model_type == "byte"
        same = held.get("kind") == ("byte" if byte else "sentencepiece")
        require(
            same and (byte or held.get("vocab_size") == vocab_size),
            f"{out} holds another tokenizer; name another folder or remove that one.",
        )
    require_writable(out.parent)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"writing {out} failed ({why}); fix that and run the same command again.") from None


@bounded
def train_tokenizer(
    sources: Sources,
    out: Path,
    *,
    vocab_size: Tokens = 8192,
    model_type: Literal["bpe", "unigram", "char", "byte"] = "bpe",
    field: str = "text",
    sample_mb: Annotated[int, Bounds(1, 2**20)] = 256,
    max_bad: Share = 0.01,
) -> None:
    """Train a tokenizer on text files and save it in a folder.

    Args:
      sources: .txt, .jsonl or .parquet files (the first two also as .gz or .zst), folders or globs.
      out: the folder to write; one that holds another tokenizer is refused.
      vocab_size: vocabulary size, including the 256 byte tokens and the control tokens.
      model_type: byte-pair encoding, a unigram model, single characters (for tagging Chinese, say), or
        plain bytes (which need no training).
      field: the field of a JSON line or the column of a Parquet file that holds the text; a path such as
        `a.b[0].c` reaches into objects and lists.
      sample_mb: maximum megabytes of text to train on, spread evenly over the sources.
      max_bad: maximum share of unreadable lines; above it, the command fails.
    """
    with _writing(out):  # found out before the work
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.absolute().parent).close()
    tokenizer: Tokenizer = ByteTokenizer()
    check_place(out, model_type, vocab_size)
    if model_type != "byte":
        texts = sample(sources, sample_mb << 20, field, max_bad)
        with alive("training the tokenizer"):
            tokenizer = train_sentencepiece(texts, vocab_size, model_type)
    with _writing(out):
        tokenizer.save(out)
    print(
        f"{out}: {tokenizer.kind} tokenizer of {tokenizer.vocab_size} entries, "
        f"digest {tokenizer.digest[:12]}",
        file=sys.stderr,
    )
