"""Text to token ids and back: a byte tokenizer and SentencePiece behind one small protocol.

Control tokens delimit documents and chat turns. They are single ids that only the code can write:
no text, not even the literal `<|end|>`, encodes to one. Shapes: V entries of the vocabulary.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Protocol, TypedDict

import msgspec
import numpy as np

from jaxgpt.errors import UserError, library_errors, require
from jaxgpt.files import Count, check_json, read_json

if TYPE_CHECKING:
    from jaxgpt.text.chat_template import ChatTemplate

NEEDED = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CONTROL = (*NEEDED, "<|mask|>")  # the mask is last and optional: older tokenizers lack it
META_FILE = "tokenizer_config.json"
MODEL_FILE = "tokenizer.model"
HF_FOLDER = "hf"  # in a saved folder: the files of a Hugging Face tokenizer, as they came
_BAR = "\u2581"  # SentencePiece writes a space as this character, so text must not hold it raw
_PARTS = re.compile(f"[\n{_BAR}]| *[^ \n{_BAR}]+| +")
_REMEMBERED, _SHORT = 1 << 17, 24  # parts remembered and their longest: some 30 MB


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer."""

    kind: str
    vocab_size: int
    control: dict[str, int]
    """Name of each control token to its id."""
    strips_space: bool
    """Whether `decode` drops one space at the start of the text, which `encode` had put there."""

    @property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's own chat template; None where dialogues are written with `control`."""
        ...

    @property
    def names(self) -> dict[int, str]:
        """Id of each control token of any sort to the name that shows it."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with `<|bos|>` by the tokenizer's own convention."""
        ...

    @property
    def sampling(self) -> Mapping[str, float]:
        """Settings of sampling that came with the model, by the names of `jaxgpt.sample.Sampling`."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text gets."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no control token is added, and none can come out of it."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text that the ids add to that of the ids which they come after.

        Control tokens are skipped, invalid UTF-8 becomes U+FFFD. A fragment is not a text: its first space
        is dropped only where the whole text begins, and its first bytes may complete a character that
        the ids before it began. Joined over fragments, the texts are that of all ids.
        """
        ...

    def piece_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for; empty for a control token."""
        ...

    def token_bytes(self) -> np.ndarray:
        """[V] int32: `len(piece_bytes(id))`; summed over `encode(text)` it is the text's bytes."""
        ...

    def word_starts(self) -> np.ndarray:
        """[V] bool: whether an id begins a word, as control tokens and white space do."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder of its own, whole or not at all."""
        ...


class Table:
    """What both tokenizers share: everything that follows from the table id -> bytes."""

    kind = ""
    vocab_size: int
    control: dict[str, int]
    strips_space = False
    _pieces: list[bytes]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        return StreamDecoder(self, after).last(ids)

    def piece_bytes(self, token: int) -> bytes:
        require(
            0 <= token < self.vocab_size,
            f"token id {token} is outside this tokenizer's 0..{self.vocab_size - 1}; "
            "use the tokenizer that wrote the ids.",
        )
        return self._pieces[token]

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def word_starts(self) -> np.ndarray:
        return np.array([piece[:1] in (b" ", b"\n", b"") for piece in self._pieces])

    @property
    def names(self) -> dict[int, str]:
        return {i: name for name, i in self.control.items()}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(sorted(self.control.values()))  # none of them is text

    @property
    def adds_bos(self) -> bool:
        return True

    @property
    def sampling(self) -> Mapping[str, float]:
        return {}

    @property
    def template(self) -> ChatTemplate | None:
        return None

    def _model(self) -> bytes:
        return b""

    def _saved(self) -> dict[str, bytes]:
        """The files of a saved folder beside META_FILE."""
        return {MODEL_FILE: self._model()} if self._model() else {}

    @cached_property
    def digest(self) -> str:
        # Without the mask, which changes no text's ids: folders from before it stay valid.
        head = json.dumps([self.kind, list(NEEDED)]).encode()
        return hashlib.sha256(head + self._model()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def save(self, folder: str | Path) -> None:
        """See `Tokenizer.save`. Raises `UserError` where the folder holds something else."""
        target = Path(folder)
        if (target / META_FILE).is_file():
            require(
                (meta := saved_meta(target)) is not None and meta["digest"] == self.digest,
                f"{target} holds another tokenizer; name another folder or remove that one.",
            )
            return
        require(
            not target.exists() or (target.is_dir() and not any(target.iterdir())),
            f"{target} exists and is not empty; a tokenizer is saved into a folder of its own.",
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            work.chmod(0o755)  # mkdtemp makes it private; a tokenizer is as readable as its run
            meta = {"kind": self.kind, "digest": self.digest, "vocab_size": self.vocab_size}
            for name, data in self._saved().items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_bytes(data)
            (work / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
            os.replace(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


class Meta(TypedDict):
    """What META_FILE holds."""

    kind: str
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]*\Z")]
    vocab_size: NotRequired[Count]


def saved_meta(folder: Path) -> Meta | None:
    """What `save` wrote about a tokenizer; None where it did not (Hugging Face has that file too)."""
    path, fix = folder / META_FILE, "restore that file"
    if not path.is_file():
        return None
    meta = read_json(path, dict[str, Any], fix)
    if not {"kind", "digest"} <= meta.keys():
        return None
    return check_json(meta, Meta, path, fix)


def text_ids(tokenizer: Tokenizer, text: str, bos: bool) -> list[int]:
    """The ids of a text that begins a document, after `<|bos|>` if it has one."""
    ids = tokenizer.encode(text)
    return [tokenizer.control["<|bos|>"], *ids] if bos else ids


def before_text(tokenizer: Tokenizer, bos: bool) -> int:
    """The id that a document's first token follows: `<|bos|>` where it has one, else the end of another."""
    return tokenizer.control["<|bos|>" if bos else "<|eos|>"]


def utf8(text: str) -> bytes:
    """The text's bytes. Raises `UserError` on a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which is not Unicode text; remove it or decode the text properly."
        ) from None


class ByteTokenizer(Table):
    """Ids 0..255 are the bytes of UTF-8; the control tokens follow.

    Args:
      control: their names; those saved before `<|mask|>` lack it, and models of theirs its id.
    """

    kind = "byte"

    def __init__(self, control: Sequence[str] = CONTROL) -> None:
        self.vocab_size = 256 + len(control)
        self.control = {name: 256 + i for i, name in enumerate(control)}
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * len(control)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))


class SentencePiece(Table):
    """A SentencePiece model (Kudo and Richardson 2018) trained by `train_sentencepiece`.

    Text is encoded in parts: runs of spaces with the word that follows, which no piece spans, so
    short ones are remembered (`data prepare` took half the time on C4). A newline is always its
    own token, so that the ids of a long text do not depend on where a reader cuts it. U+2581,
    which SentencePiece itself would turn into a space, goes through its three byte tokens.

    Raises:
      UserError: when the model is damaged or lacks the control tokens or the byte tokens.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str = "the model") -> None:
        import sentencepiece

        with library_errors(f"{where} is not a SentencePiece model", "train it again"):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._bytes = model
            self._read(where)

    def _read(self, where: str) -> None:
        sp = self._processor
        self.vocab_size = int(sp.get_piece_size())
        names = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self.control = {n: i for i, n in enumerate(names) if n in CONTROL and sp.is_control(i)}
        missing = [name for name in NEEDED if name not in self.control]
        require(
            not missing and any(sp.is_byte(i) for i in range(self.vocab_size)),
            f"{where} lacks {', '.join(missing) or 'byte fallback'}; make it with `jaxgpt tokenizer train`.",
        )
        self._pieces = [self._piece(i, name) for i, name in enumerate(names)]
        ids = {name: i for i, name in enumerate(names) if sp.is_byte(i)}
        cuts = {cut: [ids[f"<0x{byte:02X}>"] for byte in cut.encode()] for cut in ("\n", _BAR)}
        self._cuts: dict[str, list[int]] = cuts
        self._known = dict(cuts)

    def _model(self) -> bytes:
        return self._bytes

    def _piece(self, token: int, name: str) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(name[3:5], 16)])
        return name.replace(_BAR, " ").encode()

    def encode(self, text: str) -> list[int]:
        utf8(text)
        if len(self._known) > _REMEMBERED:
            self._known = dict(self._cuts)
        known = self._known  # another thread may start a new one meanwhile
        parts = _PARTS.findall(text)
        new = list({part for part in parts if part not in known})
        if not new:
            return list(chain.from_iterable(map(known.__getitem__, parts)))
        fresh = dict(zip(new, self._processor.encode(new, num_threads=1), strict=True))
        known.update((part, ids) for part, ids in fresh.items() if len(part) <= _SHORT)
        return [i for part in parts for i in (fresh.get(part) or known[part])]

    def __getstate__(self) -> dict[str, bytes]:
        return {"model": self._bytes}  # the C++ processor is rebuilt, in whatever process

    def __setstate__(self, state: dict[str, bytes]) -> None:
        SentencePiece.__init__(self, state["model"])


class StreamDecoder:
    """Text of a stream of ids, each piece as soon as its characters are complete.

    The concatenation of what `feed` and `flush` return equals `decode` of all ids with the same `after`.

    Args:
      tokenizer: of the ids.
      after: the ids that the stream comes after, whose text is not given again.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = tokenizer.strips_space
        self._text(after)

    def feed(self, token: int) -> str:
        """The characters that this id completes; possibly none."""
        return self._text([token])

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was never completed."""
        return self.last(())

    def last(self, ids: Iterable[int]) -> str:
        """The characters of the last ids, whole or not."""
        return self._text(ids, final=True)

    def _text(self, ids: Iterable[int], final: bool = False) -> str:
        data = b"".join(self._tokenizer.piece_bytes(int(i)) for i in ids)
        text = self._decoder.decode(data, final)
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text
