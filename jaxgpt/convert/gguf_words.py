"""Tokenizers in GGUF's metadata, both ways: SentencePiece (`llama`) and byte-level BPE (`gpt2`).

A SentencePiece model's pieces, scores and types are kept as they are; of byte-level BPE how a text is cut
before merging is kept as a name alone, so that only the names in `CUTS` can be read or written (llama.cpp,
src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import to_json
from jaxgpt.text import hf_files
from jaxgpt.text.hf_tokenizer import HFTokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`, numbered as SentencePiece numbers its pieces."""
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Special tokens in Hugging Face's files, and their ids in GGUF's metadata."""
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_P = "tokenizer.ggml."
_BPE = 2


class Cut(NamedTuple):
    """How a text is cut into words before bytes are merged.

    Attributes:
      pattern: regular expression of the words; empty for GPT-2's, which the tokenizers library has.
      digits: whether each digit is a word.
      nfc: whether the text is normalised first.
      whole: whether a word that is an entry is taken without merging.
    """

    pattern: str = ""
    digits: bool = False
    nfc: bool = False
    whole: bool = False

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The pre-tokenizers of tokenizer.json."""
        digits = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return [*digits, *([split] if self.pattern else []), _LEVEL | {"use_regex": not self.pattern}]


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
_WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "gpt-2": Cut(),
    "llama-bpe": Cut(_WORDS % "{1,3}", whole=True),
    "qwen2": Cut(_WORDS % "", nfc=True),
    "smollm": Cut(digits=True),
}
"""By `tokenizer.ggml.pre`."""
_SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


# --------------------------------------------------------------------------------------------- read


def read_words(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the tokenizer, as `HFTokenizer` takes them.

    Raises:
      UserError: a kind of tokenizer that is not supported.
    """
    own = {name.removeprefix(_P): value for name, value in metadata.items() if name.startswith(_P)}
    kind = own.get("model")
    require_known(str(kind), ("llama", "gpt2"), f"tokenizer.ggml.model is {kind!r:.60}")
    tokens, types = own["tokens"], own.get("token_type") or [NORMAL] * len(own["tokens"])
    roles = {role: tokens[own[name]] for role, name in ROLES.items() if name in own}
    ends = sorted({own[name] for name in _ENDS if name in own})
    config = roles | {
        "tokenizer_class": "LlamaTokenizer" if kind == "llama" else "PreTrainedTokenizerFast",
        "add_bos_token": bool(own.get("add_bos_token", kind == "llama")),
        "clean_up_tokenization_spaces": False,
    }
    first = {name: own[name] for name in ("bos_token_id",) if name in own}
    parts = {hf_files.CONFIG: config, hf_files.GENERATION: {"eos_token_id": ends, **first}}
    files = {name: to_json(part, 2).encode() for name, part in parts.items()}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    if kind == "llama":
        return files | {"tokenizer.model": _sentencepiece(own, tokens, types)}
    return files | {"tokenizer.json": to_json(_byte_level(own, tokens, types)).encode()}


def _sentencepiece(own: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """SentencePiece's file of a vocabulary."""
    model = _model_file()
    for token, score, kind in zip(tokens, own["scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = _BPE
    model.trainer_spec.byte_fallback = BYTE in types
    for role in ("bos", "eos", "unk", "pad"):
        known = own.get(ROLES[f"{role}_token"], -1)
        setattr(model.trainer_spec, f"{role}_id", known)
        if known >= 0:
            setattr(model.trainer_spec, f"{role}_piece", tokens[known])
    if UNKNOWN in types:
        model.trainer_spec.unk_id = types.index(UNKNOWN)
        model.trainer_spec.unk_piece = tokens[model.trainer_spec.unk_id]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(own.get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = bool(own.get("remove_extra_whitespaces", False))
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()


def _model_file() -> Any:
    """An empty message of SentencePiece's file."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto()  # pyrefly: ignore[missing-attribute]


def _byte_level(own: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """tokenizer.json of a vocabulary."""
    name = own.get("pre", "default")
    name = _SAME.get(name, name)
    require_known(name, CUTS, f"tokenizer.ggml.pre is {name!r:.60}")
    cut = CUTS[name]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": types[i] != USER}
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, UNKNOWN, USER)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.steps},
        "post_processor": _opening(own, tokens),
        "decoder": _LEVEL | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] == NORMAL},
            "merges": [merge.split(" ", 1) for merge in own.get("merges", [])],
            "ignore_merges": cut.whole,
        },
    }


def _opening(own: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts a token before every text, where one is wanted."""
    if not own.get("add_bos_token") or "bos_token_id" not in own:
        return None
    bos = tokens[own["bos_token_id"]]
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [own["bos_token_id"]], "tokens": [bos]}},
    }


# -------------------------------------------------------------------------------------------- write


def write_words(words: HFTokenizer, rows: int, samples: tuple[str, ...], *, bos: bool) -> dict[str, Any]:
    """The metadata of a tokenizer.

    Args:
      words: the tokenizer.
      rows: of the embedding; those beyond the tokenizer's entries are named as llama.cpp names them.
      samples: texts of which the metadata must give the same ids.
      bos: whether a text begins with `<|bos|>`.

    Raises:
      UserError: it is neither SentencePiece's BPE nor byte-level BPE cut in a known way.
    """
    table = _table(words)
    table["tokens"] += [f"[PAD{i}]" for i in range(len(table["tokens"]), rows)]
    for name, rest in (("token_type", UNUSED), ("scores", 0.0)):
        if name in table:
            table[name] += [rest] * (rows - len(table[name]))
    table |= {ROLES[role]: words.special[name] for role, name in words.roles.items() if role in ROLES}
    table["eos_token_id"] = words.control["<|eos|>"]
    others = [i for i in words.stop_ids if i != table["eos_token_id"]]
    table |= dict(zip(_ENDS[1:], others, strict=False))
    metadata = {_P + name: value for name, value in table.items()} | {_P + "add_bos_token": bos}
    if words.template is not None:
        metadata["tokenizer.chat_template"] = words.template.source
    if words.strips_space:  # Metaspace puts no space before one that is there, SentencePiece does
        samples = tuple(text.lstrip(" ") for text in samples)
    back = HFTokenizer(read_words(metadata), "the file to write")
    wrong = next((text for text in samples if back.encode(text) != words.encode(text)), None)
    require(
        wrong is None,
        f"this tokenizer has no form in GGUF that gives the same ids (of {wrong!r:.40}, say); "
        "`--format hf` writes it as it is.",
    )
    return metadata


def _table(words: HFTokenizer) -> dict[str, Any]:
    """The entries, their types, and what decides how a text is merged of them."""
    pieces = _pieces(words.files["tokenizer.model"]) if "tokenizer.model" in words.files else None
    spec = {} if pieces else hf_files.library_spec(words.files, "the tokenizer")
    model = spec.get("model", {"byte_fallback": True})
    names, unknown = words.vocabulary, words.roles.get("unk_token", model.get("unk_token"))
    users = {token["content"] for token in words.added} - words.special.keys()

    def kind(i: int) -> int:
        token = names.get(i)
        if token is None:
            return UNUSED
        # Bytes never lack a token: what GPT-2's files call the unknown one is that which ends a text.
        if token == unknown and model.get("byte_fallback"):
            return UNKNOWN
        if token in words.special:
            return CONTROL
        if model.get("byte_fallback") and hf_files.BYTE.fullmatch(token):
            return BYTE
        return USER if token in users else NORMAL

    ids = range(words.vocab_size)
    common: dict[str, Any] = {
        "tokens": [names.get(i, f"[PAD{i}]") for i in ids],
        "token_type": [kind(i) for i in ids],
    }
    if pieces is None and not model.get("byte_fallback"):
        merges = [" ".join(pair) for pair in _merges(model)]
        return {"model": "gpt2", "pre": _cut_of(spec), "merges": merges} | common
    scores = pieces if pieces is not None else _ranks(_merges(model))
    common["scores"] = [scores.get(name, 0.0) for name in common["tokens"]]
    return {"model": "llama", "pre": "default", "add_space_prefix": words.strips_space} | common


def _pieces(data: bytes) -> dict[str, float]:
    """The scores of a SentencePiece file's pieces."""
    model = _model_file()
    model.ParseFromString(data)
    require(
        model.trainer_spec.model_type == _BPE,
        "the tokenizer is SentencePiece's, but not by byte-pair encoding, and GGUF's readers know no other "
        "of a decoder; `--format hf` writes it.",
    )
    return {piece.piece: float(piece.score) for piece in model.pieces}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The merges of a tokenizer.json."""
    require(
        isinstance(model["vocab"], dict) and "merges" in model,
        f"the tokenizer is a {model.get('type')} model, and GGUF's readers know byte-pair encoding alone "
        "of a decoder; `--format hf` writes it.",
    )
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _ranks(merges: list[tuple[str, ...]]) -> dict[str, float]:
    """Scores that order pieces as merges do: the piece that is merged first has the highest."""
    made = dict.fromkeys("".join(pair) for pair in merges)
    return {piece: -float(rank) for rank, piece in enumerate(made, 1)}


def _cut_of(spec: Mapping[str, Any]) -> str:
    """The name of how a tokenizer.json cuts a text.

    Raises:
      UserError: it has none.
    """
    if not spec["model"]["merges"]:  # bytes alone: every cut gives the same
        return "gpt-2"
    node = spec.get("pre_tokenizer") or {}
    seen = [_essence(step) for step in node.get("pretokenizers", [node])]
    for name, cut in CUTS.items():
        if seen == [_essence(step) for step in cut.steps]:
            return name
    raise UserError(
        "the tokenizer cuts texts in a way that has no name in GGUF; only those of "
        f"{', '.join(CUTS)} are written."
    )


def _essence(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a pre-tokenizer decides the words."""
    pattern = (step.get("pattern") or {}).get("Regex")
    regex = step.get("use_regex", True) if step.get("type") == "ByteLevel" else None
    return (
        step.get("type"),
        pattern,
        regex,
        bool(step.get("individual_digits")),
        bool(step.get("add_prefix_space")),
    )
