"""Tokenizers of Hugging Face models, kept with their files, behind the protocol of tokenizer.py.

What differs from transformers, on purpose: no text can write a control token (`encode`), and a
control token written by a chat template is one only where the template wrote it (`rendered`).
Shapes: V entries of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path

import numpy as np

from jaxgpt.errors import UserError, require
from jaxgpt.text import hf_files
from jaxgpt.text.chat_template import ChatTemplate
from jaxgpt.text.hf_backends import Library, Processor, load_processor, processor_ids, spec_ids
from jaxgpt.text.tokenizer import HF_FOLDER, Table, utf8

log = logging.getLogger(__name__)


class HFTokenizer(Table):
    """A Hugging Face tokenizer; make one with `from_folder`.

    `control` has `<|bos|>` (else `[CLS]`, else the end), `<|eos|>` (else `[SEP]`), `<|pad|>` (else
    the end) and, where there is one, `<|mask|>`; several may be one id. The turns of a dialogue are
    written by `template`. A text's `encode` may begin with the space that SentencePiece puts before
    it: `decode` drops it again, `token_bytes` counts it. `decode` is the library's wherever the bytes are
    UTF-8; of a broken run of byte tokens it keeps the characters that are whole.

    Args:
      files: name -> bytes of each file; kept as they are, for `save` and for export.
      where: names the tokenizer in errors.
      rows: of the model's embedding. If only added tokens lie beyond them, those do not exist: the text
        model of Gemma 3 has no row for its tokenizer's token of images. None: there is no such limit.

    Raises:
      UserError: damaged files, a kind of tokenizer that is not supported, or none that ends a text.
    """

    kind = "hf"

    def __init__(
        self, files: dict[str, bytes], where: str = "the tokenizer", rows: int | None = None
    ) -> None:
        self.files, self._where = dict(files), where
        self._by_library = "tokenizer.json" in files or "tokenizer.model" not in files
        spec = hf_files.library_spec(files, where) if self._by_library else {}
        if self._by_library:
            ids, special, roles = spec_ids(spec), set[str](), dict[str, str]()
            added = {t["content"]: t for t in spec.get("added_tokens") or []}
        else:
            ids, special, roles = processor_ids(load_processor(files["tokenizer.model"], where))
            added = {}
        for name, entry in hf_files.added_tokens(files, where).items():
            if ids.setdefault(name, entry["id"]) == entry["id"]:
                added.setdefault(name, entry)
        beyond = set[str]() if rows is None else {name for name, i in ids.items() if i >= rows}
        if beyond <= added.keys():  # else it is another model's
            ids = {name: i for name, i in ids.items() if name not in beyond}
            added = {name: entry for name, entry in added.items() if name not in beyond}
        self.roles = roles | hf_files.roles(files, ids, where)
        """Special tokens by their names in templates: `bos_token`, `eos_token`, ..."""
        names = {i: name for name, i in ids.items()}
        ends = hf_files.generation_ids(files, "eos_token_id", where)
        special |= {n for n, t in added.items() if t.get("special")} | set(self.roles.values())
        special |= {n for n in hf_files.extra_special(files, where) if n in ids}
        special |= {names[i] for i in ends if i in names}
        self.vocab_size = max(ids.values()) + 1
        more = hf_files.model_ends(files, self.vocab_size, where)
        special |= {names[i] for i in more if names.get(i) in added}  # others stay words of the vocabulary
        special = {n for n in special if len(n) > 1}  # a model may pad with "!", which stays text
        self.special = {name: ids[name] for name in sorted(special, key=ids.__getitem__)}
        """Control tokens of every sort: never made of text, never decoded."""
        for name, i in self.special.items():
            added.setdefault(name, hf_files.added_entry(name, {"id": i, "special": True}))
        self._set_control({role: ids[name] for role, name in self.roles.items()}, [*ends, *more])
        nonce = secrets.token_hex(12)
        self._private = {name: f"<|{nonce}-{i}|>" for name, i in self.special.items()}
        longest = "|".join(re.escape(n) for n in sorted(self.special, key=len, reverse=True))
        self._names = re.compile(longest or "(?!)")
        self.added = [added[name] for name in sorted(added)]
        """Tokens beside the model's own, as entries of tokenizer.json's `added_tokens`."""
        self._backend: Library | Processor
        if self._by_library:
            self._backend = Library(spec, self.added, self._private, where)
        else:
            inner = {self._private.get(n, n): t["id"] for n, t in added.items()}
            self._backend = Processor(files["tokenizer.model"], inner, where)
        self._source = hf_files.chat_template(files, where)
        self.strips_space = self._backend.strips_space
        self._pieces = [b""] * self.vocab_size
        for name, i in ids.items():
            self._pieces[i] = b"" if name in self.special else self._backend.piece(i, name)
        self.vocabulary = names
        """Id of each token to its name in the files."""

    @classmethod
    def from_folder(cls, folder: str | Path, rows: int | None = None) -> HFTokenizer:
        """The tokenizer of a Hugging Face folder (see `hf_files` for the layouts).

        Raises:
          UserError: as for the class.
        """
        return cls(hf_files.read_files(Path(folder)), str(folder), rows)

    def within(self, rows: int) -> HFTokenizer:
        """The same without the added tokens that an embedding of so many rows lacks."""
        return HFTokenizer(self.files, self._where, rows)

    def _set_control(self, roles: dict[str, int], ends: Sequence[int]) -> None:
        where = self._where
        eos = next((roles[n] for n in ("eos_token", "sep_token") if n in roles), ends[0] if ends else None)
        if eos is None:
            raise UserError(f"{where} names no token that ends a text; set eos_token in {hf_files.CONFIG}.")
        starts = hf_files.generation_ids(self.files, "bos_token_id", where)
        bos = next((roles[n] for n in ("bos_token", "cls_token") if n in roles), (starts or [eos])[0])
        self.control = {"<|bos|>": bos, "<|eos|>": eos, "<|pad|>": roles.get("pad_token", eos)}
        if "mask_token" in roles:
            self.control["<|mask|>"] = roles["mask_token"]
        self._ends = {eos, *ends}
        require(
            max(self._ends | {bos}) < self.vocab_size,
            f"{where}/generation_config.json names an id beyond the vocabulary's {self.vocab_size}; fix it.",
        )

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The model's own chat template.

        Raises:
          UserError: when it is not valid Jinja.
        """
        return None if self._source is None else ChatTemplate(self._source, self, self._where)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation: of the files, and the end of turn that the template writes."""
        ends = set(self._ends)
        if self.template is not None and (name := self.template.end_of_answers()) is not None:
            ends.add(self.special[name])
        return tuple(sorted(ends))

    @cached_property
    def adds_bos(self) -> bool:
        return hf_files.adds_bos(self.files, self.roles, self._where)

    @cached_property
    def sampling(self) -> dict[str, float]:
        return hf_files.sampling(self.files, self._where)

    @cached_property
    def names(self) -> dict[int, str]:
        return {i: name for name, i in self.special.items()}

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self._backend.encode(text)

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of a text in which control tokens may be written: as transformers encodes it."""
        return self.rendered(text)[0]

    def rendered(
        self, text: str, spans: Sequence[tuple[int, int]] = (), guard: str = ""
    ) -> tuple[list[int], list[float]]:
        """The ids of a rendered template, each with weight 1 where it lies in one of the spans.

        Args:
          text: control tokens written in it become their ids, unless `broken` has put guards in.
          spans: characters [start, end) of the text; a token that reaches over an edge has weight 0,
            but for a control token, which may have swallowed the white space behind it.
          guard: the character that `broken` put in.
        """
        utf8(text)
        ids, offsets = self._backend.spans(self._swap(text, guard))
        weights = [0.0] * len(ids)
        for a, b in spans:
            a, b = (len(self._swap(text[:at], guard)) for at in (a, b))
            first, after = (bisect_left(offsets, at, key=itemgetter(0)) for at in (a, b))
            weights[first:after] = [1.0] * (after - first)
            for i in range(after - 1, first - 1, -1):
                if offsets[i][1] <= b:
                    break
                weights[i] = float(ids[i] in self.names)
        return ids, weights

    def _swap(self, text: str, guard: str) -> str:
        private = self._private
        text = self._names.sub(lambda found: private[found[0]], text)
        return text.replace(guard, "") if guard else text

    def broken(self, text: str, guard: str) -> str:
        """The text with a guard in each control token's name, so that it is one no more.

        One goes too where the text, less its white space, ends as a name begins or begins as one ends.
        """
        while self._names.search(text):  # again, since names may overlap
            text = self._names.sub(lambda found: found[0][0] + guard + found[0][1:], text)
        core, (heads, tails) = text.strip(), self._edges
        longest = range(1, max(map(len, heads), default=0) + 1)
        if any(core[-k:] in heads for k in longest):
            text = text.rstrip() + guard + text[len(text.rstrip()) :]
        if any(core[:k] in tails for k in longest):
            text = text[: -len(text.lstrip())] + guard + text.lstrip()
        return text

    @cached_property
    def _edges(self) -> tuple[set[str], set[str]]:
        """What control tokens' names begin and end with, short of the whole."""
        cuts = [(name[:k], name[k:]) for name in self.special for k in range(1, len(name))]
        return {head for head, _ in cuts}, {tail for _, tail in cuts}

    def word_starts(self) -> np.ndarray:
        starts = super().word_starts()
        if (prefix := self._backend.word_prefix) is not None:
            for i, name in self.vocabulary.items():
                starts[i] = name in self.special or not name.startswith(prefix)
        return starts

    @cached_property
    def digest(self) -> str:
        table = {"control": self.control, "special": self.special, "added": self.added}
        if self._by_library:
            spec = hf_files.library_spec(self.files, self._where)
            read = ("model", "normalizer", "pre_tokenizer")
            table |= {key: spec.get(key) for key in read}
        data = json.dumps([self.kind, table], sort_keys=True).encode()
        if not self._by_library:
            data += self.files["tokenizer.model"]
        return hashlib.sha256(data).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HFTokenizer) and (self.digest, self._source) == (other.digest, other._source)

    __hash__ = Table.__hash__

    def _saved(self) -> dict[str, bytes]:
        return {f"{HF_FOLDER}/{name}": data for name, data in self.files.items()}

    def __getstate__(self) -> dict[str, object]:
        # The libraries' objects are made again.
        return {"files": self.files, "where": self._where, "rows": self.vocab_size}

    def __setstate__(self, state: dict[str, object]) -> None:
        HFTokenizer.__init__(self, **state)  # type: ignore[arg-type]
