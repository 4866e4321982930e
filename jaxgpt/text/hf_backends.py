"""The two libraries behind a Hugging Face tokenizer: tokenizers and SentencePiece.

Both are given the control tokens under private names that are drawn anew in every process, so no
text can write one: the private name, and nothing else, becomes the control token's id. The literal
`</s>` of a web page is then text like any other, which `encode_special_tokens` of the tokenizers
library does not promise (a Unigram model finds the piece `</s>` by itself).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from jaxgpt.errors import UserError, library_errors, require
from jaxgpt.text import hf_files

BAR = "\u2581"
Spans = tuple[list[int], list[tuple[int, int]]]
"""Ids, and the characters [start, end) of the text that each stands for."""


class Backend(Protocol):
    """What the tokenizer knows of a library."""

    strips_space: bool
    """Whether decoding drops one leading space of the text (that encoding had put there)."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens stand under their private names."""
        ...

    def spans(self, text: str) -> Spans:
        """`encode` with offsets."""
        ...

    def piece(self, token: int, name: str) -> bytes:
        """The bytes that an ordinary token adds to the decoded text."""
        ...


# --------------------------------------------------------------------------------------- tokenizers


def spec_ids(spec: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json and its id."""
    vocab = spec["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, *_) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in spec.get("added_tokens") or []}


def _parts(node: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, out of their sequences."""
    if not isinstance(node, dict):
        return []
    for key in ("decoders", "pretokenizers", "normalizers"):
        if key in node:
            return [part for child in node[key] for part in _parts(child)]
    return [node]


def byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Library:
    """A tokenizer.json in the tokenizers library.

    Args:
      spec: the parsed file.
      added: all added tokens, as entries of its `added_tokens`.
      private: control token -> its private name.
      where: the folder, for errors.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        added: Sequence[Mapping[str, Any]],
        private: Mapping[str, str],
        where: str,
    ) -> None:
        import tokenizers

        self._verbatim = _verbatim(spec["model"], {t["content"] for t in added})
        tokens = [{**t, "content": private.get(t["content"], t["content"])} for t in added]
        whole = {
            **spec,
            "truncation": None,
            "padding": None,
            "post_processor": None,  # it adds control tokens, and trims offsets
            "added_tokens": sorted(tokens, key=lambda t: t["id"]),
            "model": _renamed(spec["model"], private),
        }
        with library_errors(f"{where}: the tokenizers library refuses it", "download it again"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
        for token in tokens:
            require(
                self._tokenizer.token_to_id(token["content"]) == token["id"],
                f"{where}: the added token of id {token['id']} does not follow the others, which is not "
                "supported; save the tokenizer again with transformers.",
            )
        self._decoding(_parts(spec.get("decoder")), where)

    def _decoding(self, steps: list[dict[str, Any]], where: str) -> None:
        kinds = {step.get("type"): step for step in steps}
        swaps = any(s.get("content") == " " and s.get("pattern") == {"String": BAR} for s in steps)
        self._bytes = byte_characters() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self.word_prefix = kinds["WordPiece"].get("prefix", "##") if "WordPiece" in kinds else None
        self._cleanup = "WordPiece" in kinds and kinds["WordPiece"].get("cleanup", True)
        self._bars = swaps or "Metaspace" in kinds
        require(
            self._bytes is not None or self.word_prefix is not None or self._bars,
            f"{where}: decoder {sorted(map(str, kinds)) or None} is not supported; allowed: byte-level, "
            "Metaspace and WordPiece.",
        )
        meta = kinds.get("Metaspace", {"prepend_scheme": "never"})
        older = "always" if meta.get("add_prefix_space", True) else "never"
        put_there = meta.get("prepend_scheme", older) != "never" or self.word_prefix is not None
        self.strips_space = put_there or bool(kinds.get("Strip", {}).get("start"))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def spans(self, text: str) -> Spans:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def piece(self, token: int, name: str) -> bytes:
        # An added token is found in a text as it is, so it is no name of bytes: GPT-2's "\u00e9" is byte 233.
        if name in self._verbatim and self.word_prefix is None:
            return name.encode()
        if self._bytes is not None:
            known = [self._bytes.get(c) for c in name]
            return name.encode() if None in known else bytes(b for b in known if b is not None)
        if self.word_prefix is not None:
            if name.startswith(self.word_prefix):
                return name.removeprefix(self.word_prefix).encode()
            return name.encode() if self._cleanup and name in (".", "?", "!", ",") else f" {name}".encode()
        if self._fallback and hf_files.BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return name.replace(BAR, " ").encode()


def _verbatim(model: Mapping[str, Any], added: set[str]) -> set[str]:
    """Added tokens that the model itself makes of no text, so that only their own text gives them."""
    pieces = spec_ids({"model": model})
    rest = added - pieces.keys()
    if (merges := model.get("merges")) is None or all(name.isascii() for name in added):
        return rest
    made = {m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges}
    return rest | {name for name in added - made if len(name) > 1}


def _renamed(model: Mapping[str, Any], private: Mapping[str, str]) -> dict[str, Any]:
    """The model with its control tokens under private names, and no merge that makes one."""
    vocab, changed = model["vocab"], dict(model)
    if isinstance(vocab, dict):
        changed["vocab"] = {private.get(name, name): i for name, i in vocab.items()}
    else:
        changed["vocab"] = [[private.get(name, name), *rest] for name, *rest in vocab]
    if isinstance(unknown := model.get("unk_token"), str):
        changed["unk_token"] = private.get(unknown, unknown)
    if "merges" in model and not private.keys().isdisjoint(vocab):
        changed["merges"] = [m for m in model["merges"] if not _makes(m, private)]
    return changed


def _makes(merge: str | Sequence[str], names: Collection[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right in names or left in names or right in names


# ------------------------------------------------------------------------------------ SentencePiece


class Processor:
    """A tokenizer.model alone: SentencePiece's own encoding between the control tokens.

    The dummy prefix (a space before the text) goes before text at the very start only, as in
    transformers' LlamaTokenizer with `legacy=False`.

    Args:
      model: the bytes of the file.
      control: private name of a control token, or name of any other added token -> its id.
    """

    word_prefix = None

    def __init__(self, model: bytes, control: Mapping[str, int], where: str) -> None:
        self._sp = load_processor(model, where)
        # Protobuf merges a message that is appended: normalizer_spec.add_dummy_prefix = false.
        self._inner = load_processor(model + b"\x1a\x02\x18\x00", where)
        self._control, self._banned = dict(control), set(control.values())
        names = sorted(control, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)")
        self.strips_space = self._sp.encode("a", out_type=str)[0].startswith(BAR)

    def encode(self, text: str) -> list[int]:
        return self.spans(text)[0] if self._cut.search(text) else self._checked(self._sp.encode(text))

    def spans(self, text: str) -> Spans:
        ids, offsets, at = list[int](), list[tuple[int, int]](), 0
        for i, part in enumerate(self._cut.split(text)):
            if i % 2:
                ids.append(self._control[part])
                offsets.append((at, at + len(part)))
            elif part:
                made, places = _encode_spans(self._inner if at else self._sp, part)
                ids += self._checked(made)
                offsets += [(at + start, at + end) for start, end in places]
            at += len(part)
        return ids, offsets

    def _checked(self, ids: list[int]) -> list[int]:
        """The ids, none of them a control token: one that the model takes for a symbol of the user's."""
        if self._banned.isdisjoint(ids) or all(i not in self._banned or self._sp.is_unknown(i) for i in ids):
            return ids
        name = next(self._sp.id_to_piece(i) for i in ids if i in self._banned and not self._sp.is_unknown(i))
        raise UserError(
            f"the text holds {name!r}, which this tokenizer.model always makes a control token; remove it "
            "from the text or use the model's tokenizer.json."
        )

    def piece(self, token: int, name: str) -> bytes:
        if token >= self._sp.get_piece_size():
            return name.encode()
        if self._sp.is_byte(token):
            return bytes([int(name[3:5], 16)])
        return name.replace(BAR, " ").encode()


def _encode_spans(processor: Any, text: str) -> Spans:
    try:
        made = processor.encode(text, return_type="offset_mapping")
        return made["ids"], made["offsets"]
    except TypeError:  # before SentencePiece 0.2.2
        pieces = processor.encode(text, out_type="immutable_proto").pieces
        return [p.id for p in pieces], [(p.begin, p.end) for p in pieces]


def load_processor(model: bytes, where: str) -> Any:
    """SentencePiece's processor of a model file's bytes."""
    import sentencepiece

    with library_errors(
        f"{where}/tokenizer.model is not a SentencePiece model",
        "download it again, or add the model's tokenizer.json",
    ):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = processor.id_to_piece(list(range(processor.get_piece_size())))
        bad = [n for i, n in enumerate(names) if processor.is_byte(i) and not hf_files.BYTE.fullmatch(n)]
    require(not bad, f"{where}/tokenizer.model has a byte of the name {bad[:1]}; download it again.")
    require(processor.get_piece_size() > 0, f"{where}/tokenizer.model is empty; download it again.")
    return processor


def processor_ids(processor: Any) -> tuple[dict[str, int], set[str], dict[str, str]]:
    """(name -> id, names of control tokens, role -> name) of a SentencePiece model."""
    names = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    control = {n for i, n in enumerate(names) if processor.is_control(i) or processor.is_unknown(i)}
    given = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
        "unk_token": processor.unk_id(),
    }
    roles = {role: names[i] for role, i in given.items() if i >= 0}
    return {name: i for i, name in enumerate(names)}, control, roles
