"""The tokenizer of a folder, of whatever kind it is."""

from __future__ import annotations

from pathlib import Path

from jaxgpt.errors import require
from jaxgpt.text.hf_files import DECIDING, holds_tokenizer
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import (
    CONTROL,
    HF_FOLDER,
    META_FILE,
    MODEL_FILE,
    NEEDED,
    ByteTokenizer,
    SentencePiece,
    Tokenizer,
    saved_meta,
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`, or that of a Hugging Face folder.

    Raises:
      UserError: when the folder holds none, a damaged one, or one whose digest is not the one it was
        saved with.
    """
    folder = Path(folder)
    meta = saved_meta(folder)
    if meta is None:
        require(
            holds_tokenizer(folder),
            f"{folder} holds no tokenizer; give a folder written by `jaxgpt tokenizer train` or a "
            f"Hugging Face one, which has {' or '.join(DECIDING)}.",
        )
        return HFTokenizer.from_folder(folder)
    kind, digest = meta["kind"], meta["digest"]
    tokenizer: Tokenizer
    if kind == "byte":
        older = meta.get("vocab_size") == 256 + len(NEEDED)
        tokenizer = ByteTokenizer(NEEDED if older else CONTROL)
    elif kind == "sentencepiece":
        path = folder / MODEL_FILE
        require(path.is_file(), f"{path} is missing; train the tokenizer again.")
        tokenizer = SentencePiece(path.read_bytes(), str(path))
    else:
        require(
            kind == "hf",
            f"{folder / META_FILE}: kind is {kind!r:.60}; allowed: 'byte', 'sentencepiece', 'hf'.",
        )
        # Added tokens beyond the size it was saved with are those its model had no rows for.
        tokenizer = HFTokenizer.from_folder(folder / HF_FOLDER, meta.get("vocab_size"))
    require(
        tokenizer.digest == digest,
        f"{folder}: the tokenizer is not the one that was saved there (digest "
        f"{tokenizer.digest[:12]}, saved {digest[:12]}); restore it or train it again.",
    )
    return tokenizer
