"""The files of a Hugging Face tokenizer folder: what they name, in whichever layout they come.

Layouts: `tokenizer.json` (the tokenizers library), or alone `tokenizer.model` (SentencePiece),
`vocab.json` with `merges.txt` or `vocab.bpe` (GPT-2), `vocab.txt` (BERT). Beside them stand
`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `generation_config.json` and
`chat_template.jinja`, of which older folders lack some and newer ones others, and the model's `config.json`,
which may name ends of a text that the others do not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, library_errors, require
from jaxgpt.files import check_json, parse_json, read_small, to_json
from jaxgpt.text.hf_schemas import SCHEMAS

AGAIN = "download it again"

log = logging.getLogger(__name__)

DECIDING = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder holds a tokenizer when it has one of these; the first there is decides the ids."""
MERGES = ("merges.txt", "vocab.bpe")
CONFIG = "tokenizer_config.json"
GENERATION, MODEL_CONFIG = "generation_config.json", "config.json"
KEPT = (
    *DECIDING, *MERGES, CONFIG, "special_tokens_map.json", "added_tokens.json",
    GENERATION, MODEL_CONFIG, "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Names of the pieces that stand for a byte, where characters have none of their own."""
SETTINGS = {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
} | {"no_repeat_ngram_size": "no_repeat_ngram"}
"""Of sampling, in generation_config.json, and their names here."""
_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes of transformers that add it unless told otherwise, whatever tokenizer.json says."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("<mask>", "[MASK]"),
}
Files = dict[str, bytes]


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the layouts."""
    return any((folder / name).is_file() for name in DECIDING)


def read_files(folder: Path) -> Files:
    """The tokenizer's files in a folder, byte for byte.

    Raises:
      UserError: when none of them decides ids, or one cannot be read.
    """
    try:
        files = {name: read_small(folder / name, AGAIN) for name in KEPT if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    require(
        any(name in files for name in DECIDING),
        f"{folder} holds no tokenizer; a Hugging Face one has {' or '.join(DECIDING)}.",
    )
    return files


def parse(files: Files, name: str, where: str) -> dict[str, Any]:
    """The JSON object of a file, checked by its schema; empty where there is no such file."""
    if name not in files:
        return {}
    value = parse_json(files[name], dict[str, Any], f"{where}/{name}", AGAIN)
    check_json(value, SCHEMAS.get(name, dict[str, Any]), f"{where}/{name}", AGAIN)
    if rb"\ud" in files[name].lower():  # half a surrogate pair is JSON but no text
        with library_errors(f"{where}/{name} is damaged", AGAIN):
            to_json(value).encode()
    return value


def roles(files: Files, ids: Mapping[str, int], where: str) -> dict[str, str]:
    """Special tokens by role (`bos_token`, ...), as far as the vocabulary has them.

    Where no file gives any role (GPT-2's, BERT's and Llama's oldest folders), the usual names count.
    """
    given: dict[str, Any] = parse(files, "special_tokens_map.json", where) | {
        k: v for k, v in parse(files, CONFIG, where).items() if v is not None
    }
    found = {role: _content(given.get(role)) for role in ROLES}
    if not any(found.values()):
        found = {r: next((n for n in names if n in ids), None) for r, names in _USUAL.items()}
        if found["cls_token"]:
            found["bos_token"] = found["eos_token"] = None
    return {role: name for role, name in found.items() if name is not None and name in ids}


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) and value else None


def extra_special(files: Files, where: str) -> list[str]:
    """Further special tokens that the configuration lists."""
    names = list[str]()
    for name in ("special_tokens_map.json", CONFIG):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = parse(files, name, where).get(key) or []
            values = value.values() if isinstance(value, dict) else value
            names += [n for n in map(_content, values) if n]
    return names


def added_tokens(files: Files, where: str) -> dict[str, dict[str, Any]]:
    """Tokens that the configuration adds to the vocabulary: content -> `id` and matching flags."""
    added: dict[str, dict[str, Any]] = {}
    for name, token in parse(files, "added_tokens.json", where).items():
        added[name] = {"id": token}
    for token, entry in (parse(files, CONFIG, where).get("added_tokens_decoder") or {}).items():
        if (name := _content(entry)) is not None:
            flags = entry if isinstance(entry, dict) else {}
            added[name] = flags | {"id": int(token)}
    return {name: added_entry(name, entry) for name, entry in added.items()}


def added_entry(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A token in the form of `added_tokens` of tokenizer.json."""
    flags = {k: bool(entry.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": int(entry["id"]), "content": name, **flags}


def generation_ids(files: Files, key: str, where: str) -> list[int]:
    """Ids that generation_config.json gives for `eos_token_id` or `bos_token_id`."""
    return _ids(parse(files, GENERATION, where), key, f"{where}/{GENERATION}")


def model_ends(files: Files, size: int, where: str) -> list[int]:
    """Ids that config.json gives for `eos_token_id`, the text model's own or the whole model's."""
    config = parse(files, MODEL_CONFIG, where)
    text = config.get("text_config")
    found = _ids(config, "eos_token_id", f"{where}/{MODEL_CONFIG}")
    found += _ids(text, "eos_token_id", f"{where}/{MODEL_CONFIG}") if isinstance(text, dict) else []
    if beyond := [i for i in found if i >= size]:  # the default of its class, in many a small model's
        log.info(
            "%s/%s: eos_token_id %s is no id of this tokenizer; left out", where, MODEL_CONFIG, beyond[0]
        )
    return [i for i in found if i < size]


def _ids(config: Mapping[str, Any], key: str, path: str) -> list[int]:
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    ids = [i for i in values if type(i) is int and i >= 0]
    strange = [v for v in values if v is not None and v not in ids and v != -1]  # -1 is none, too
    if strange:
        log.warning("%s: %s %.40r is no id of a token; left out", path, key, strange[0])
    return ids


def sampling(files: Files, where: str) -> dict[str, float]:
    """The settings of sampling in generation_config.json, by name; what is no number is said and left out."""
    config = parse(files, GENERATION, where)
    found: dict[str, float] = {}
    for name, own in SETTINGS.items():
        value = config.get(name)
        whole = own in ("top_k", "no_repeat_ngram")
        if isinstance(value, int if whole else int | float) and not isinstance(value, bool):
            found[own] = value
        elif value is not None:
            log.warning("%s/%s: %s is %.40r, which cannot be; left out", where, GENERATION, name, value)
    chance = config.get("do_sample")
    if chance is True:
        return {"temperature": 1.0} | found
    return found if chance is None else found | {"temperature": 0.0}


def adds_bos(files: Files, roles: Mapping[str, str], where: str) -> bool:
    """Whether transformers puts a token before every text, as the model was trained on.

    `add_bos_token` says so, else what tokenizer.json does to an encoded text; where there is neither, the
    class of the tokenizer.
    """
    config = parse(files, CONFIG, where)
    said, kind = config.get("add_bos_token"), str(config.get("tokenizer_class")).removesuffix("Fast")
    if isinstance(said, bool):
        return said and "bos_token" in roles
    if "tokenizer.json" in files and kind not in _ADD_BOS:
        return _opens(parse(files, "tokenizer.json", where).get("post_processor"))
    if "tokenizer.json" in files or "tokenizer.model" in files:
        return "bos_token" in roles
    return "cls_token" in roles


def _opens(processor: Any) -> bool:
    """Whether a post-processor of tokenizer.json puts a token before a text."""
    if not isinstance(processor, dict):
        return False
    parts, single = processor.get("processors"), processor.get("single")
    if isinstance(parts, list):
        return any(map(_opens, parts))
    if isinstance(single, list):
        return bool(single) and isinstance(single[0], dict) and "SpecialToken" in single[0]
    return processor.get("type") in ("BertProcessing", "RobertaProcessing")


def chat_template(files: Files, where: str) -> str | None:
    """The chat template's source: a file of its own, else the configuration's (its "default")."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}/chat_template.jinja is not UTF-8; download it again.") from None
    for name in ("chat_template.json", CONFIG):
        value = parse(files, name, where).get("chat_template")
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def library_spec(files: Files, where: str) -> dict[str, Any]:
    """The tokenizer as an object of the tokenizers library's JSON, whatever layout it came in."""
    if "tokenizer.json" in files:
        spec = parse(files, "tokenizer.json", where)
        if isinstance(spec["model"]["vocab"], dict):
            _check_ids(spec["model"]["vocab"], f"{where}/tokenizer.json")
        return spec
    config = parse(files, CONFIG, where)
    if "vocab.json" in files:
        return _gpt2(files, where, bool(config.get("add_prefix_space", False)))
    return _bert(files, where, config)


def _check_ids(vocab: Mapping[str, int], path: str) -> None:
    """Refuse a vocabulary in which several tokens have one id."""
    names = {i: name for name, i in vocab.items()}
    twice = [name for name, i in vocab.items() if names[i] != name]
    others = [f"{name!r:.60} and {names[vocab[name]]!r:.60}" for name in twice[:1]]
    require(not twice, f"{path} gives one id to {' '.join(others)}; {AGAIN}.")


def _text(files: Files, name: str, where: str) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}/{name} is not UTF-8; download it again.") from None


def _gpt2(files: Files, where: str, prefix: bool) -> dict[str, Any]:
    name = next((n for n in MERGES if n in files), None)
    if name is None:
        raise UserError(f"{where} has vocab.json but neither {' nor '.join(MERGES)}; add the merges.")
    lines = [line for line in _text(files, name, where).split("\n") if line.strip()]
    merges = [line.rstrip("\r").split(" ") for line in lines if not line.startswith("#version")]
    require(
        all(len(pair) == 2 for pair in merges),
        f"{where}/{name} is damaged: a line is not two pieces; download it again.",
    )
    vocab = parse(files, "vocab.json", where)
    _check_ids(vocab, f"{where}/vocab.json")
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _bert(files: Files, where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    lines = _text(files, "vocab.txt", where).split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i < len(lines) - 1}
    unknown = _content(config.get("unk_token")) or "[UNK]"
    require(unknown in vocab, f"{where}/vocab.txt lacks {unknown}; download it again.")
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", True),
    }
    model = {
        "type": "WordPiece",
        "unk_token": unknown,
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": model,
    }
