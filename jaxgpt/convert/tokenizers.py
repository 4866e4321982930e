"""A run's tokenizer as Hugging Face files: those it came with, or a tokenizer.json built for it.

What is built is checked against ours on sample text; where an id differs it is left out, with a
warning, since a wrong tokenizer is worse than none.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from jaxgpt.text import hf_files
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import MODEL_FILE, Tokenizer

log = logging.getLogger(__name__)

TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The dialogues of jaxgpt.text.chat in Jinja."""
SAMPLE = (
    'Once upon a time, there was a little girl named Lily.\n\nShe said: "I\'m 1,234 years old!"  Really?\n',
    "def f(x):\n    return x**2  # four spaces\n\tand a tab\r\n",
    "Größe, naïve café, Ελληνικά, русский, 日本語のテキスト, العربية, हिन्दी 🎉👩‍👩‍👧",
    "  leading and trailing   ",
    "aaaaaaa bbbbbb abababab 000000 ....... ------ \x00\x7f <0x41> <unk>",
    "",
)
"""What must get the same ids: spaces, lines, digits, scripts, repetitions, names of special pieces."""
_BAR, _NOWHERE = "\u2581", "\uffff"


def with_ends(config: dict[str, Any], words: Tokenizer) -> dict[str, Any]:
    """A config.json or generation_config.json whose `eos_token_id` is all that ends a text of the run."""
    ends = list(words.stop_ids)
    if not isinstance(words, HFTokenizer):  # no control token of ours is text, but these are written
        ends = sorted({words.control["<|eos|>"], words.control["<|end|>"]})
    held = config.get("eos_token_id")
    same = sorted(map(str, held if isinstance(held, list) else [held])) == sorted(map(str, ends))
    return config if same else config | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def own_generation(words: Tokenizer) -> dict[str, Any]:
    """The generation_config.json that came with a tokenizer."""
    if not isinstance(words, HFTokenizer):
        return {}
    return hf_files.parse(words.files, hf_files.GENERATION, "the tokenizer")


def write(folder: Path, words: Tokenizer, saved: Path, *, dialogues: bool) -> None:
    """Write what transformers needs to read and write text.

    Args:
      folder: where to.
      words: the run's tokenizer.
      saved: the folder it was saved in.
      dialogues: whether the run was tuned on them: its template is then written too.
    """
    if isinstance(words, HFTokenizer):
        for name, data in words.files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(data)
        return
    if words.kind == "byte":
        spec = _spec(_bytes_model(), words, normalizer=None, split={"type": "ByteLevel"} | _BYTE_LEVEL)
    else:
        spec = _sentencepiece(words, saved / MODEL_FILE)
    if not _agrees(spec, words):
        log.warning(
            "the tokenizer%s not exported: the tokenizers library cannot give the same ids; use %s",
            " and its chat template are" if dialogues else " is", saved,
        )  # fmt: skip
        return
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", "utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>" if dialogues else "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    if dialogues:
        config["chat_template"] = TEMPLATE
        (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _spec(model: dict[str, Any], words: Tokenizer, *, normalizer: Any, split: Any) -> dict[str, Any]:
    """A tokenizer.json around a model; <|bos|> begins every text, as it does in training."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    controls = sorted(words.control.items(), key=lambda item: item[1])
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    spaces = {"type": "Replace", "pattern": {"String": _BAR}, "content": " "}
    parts = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = {"type": "Sequence", "decoders": parts}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in controls],
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                "<|bos|>": {"id": "<|bos|>", "ids": [words.control["<|bos|>"]], "tokens": ["<|bos|>"]}
            },
        },
        "decoder": {"type": "ByteLevel"} | _BYTE_LEVEL if words.kind == "byte" else decoder,
        "model": model,
    }


def _bytes_model() -> dict[str, Any]:
    """Bytes as the characters that the library's ByteLevel writes for them (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {"type": "BPE", "vocab": {names[byte]: byte for byte in range(256)}, "merges": []}


def _sentencepiece(words: Tokenizer, path: Path) -> dict[str, Any]:
    """Our SentencePiece: no piece spans the parts that `SentencePiece.encode` cuts a text into."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    ids = range(sp.get_piece_size())
    pieces, scores = [sp.id_to_piece(i) for i in ids], [sp.get_score(i) for i in ids]
    plain = [i for i in ids if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))]
    pattern = {"Regex": f"\n|{_BAR}*[^\n{_BAR}]+|{_BAR}+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": _BAR}
    if all(scores[i] == int(scores[i]) for i in plain):  # ranks, as byte-pair encoding has
        model: dict[str, Any] = {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(pieces)},
            "merges": _merges({pieces[i]: scores[i] for i in plain}),
            "unk_token": pieces[sp.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
        }
    else:
        chosen = set(plain)
        vocab = [[pieces[i], scores[i] if i in chosen else -1e6] for i in ids]
        vocab[sp.unk_id()][0] = _NOWHERE  # a text may hold the usual name, <unk>
        model = {"type": "Unigram", "vocab": vocab, "unk_id": sp.unk_id(), "byte_fallback": True}
    return _spec(model, words, normalizer=normalizer, split=split)


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best piece first."""
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        known.sort(key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
        merges += [list(pair) for pair in known]
    return merges


def _agrees(spec: dict[str, Any], words: Tokenizer) -> bool:
    """Whether the library gives the sample texts the ids that ours gives, and the texts back."""
    import tokenizers

    built = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in SAMPLE:
        ids = words.encode(text)
        if built.encode(text, add_special_tokens=False).ids != ids or built.decode(ids) != text:
            return False
    return all(built.token_to_id(name) == i for name, i in words.control.items())
