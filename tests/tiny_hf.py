"""Tiny Hugging Face tokenizers and chat templates, for tests and for goldens/make_chat_template.py.

Nothing is trained: the merges spell out a few words, so that every version makes the same ids.
"""

from __future__ import annotations

import json

WORDS = ["the", "cat", "sat", "user", "assistant", "system", "hello", "world", "end"]
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = ["<|begin|>", "<|end_of_text|>", "<|header|>", "<|/header|>", "<|eot|>"]


def _merges(words: list[str], mark: str) -> tuple[list[str], list[list[str]]]:
    pieces: dict[str, None] = {}
    merges = []
    for word in words:
        pairs = [[word[:i], word[i]] for i in range(1, len(word))] + [[mark, word]]
        merges += [pair for pair in pairs if "".join(pair) not in pieces]
        pieces |= dict.fromkeys(map("".join, pairs))
    return list(pieces), merges


def _added(special: list[str], first: int, ordinary: tuple[str, ...] = ()) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = [*special, *ordinary]
    return [{"id": first + i, "content": n, **flags, "special": n in special} for i, n in enumerate(names)]


def _files(spec: dict, config: dict, **more: dict) -> dict[str, bytes]:
    whole = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None} | spec
    objects = {"tokenizer.json": whole, "tokenizer_config.json": config}
    objects |= {f"{name}.json": value for name, value in more.items()}
    return {name: json.dumps(value).encode() for name, value in objects.items()}


def byte_level(
    special: list[str] = CHATML_SPECIAL, template: str | None = None, **config
) -> dict[str, bytes]:
    """As GPT-2, Llama-3 and Qwen: bytes under printable names; `<think>` is added but ordinary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    names = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    pieces, merges = _merges(WORDS, "Ġ")
    vocab = {name: i for i, name in enumerate([*names, *pieces])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "added_tokens": _added(special, len(vocab), ("<think>", "</think>")),
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    names = {"bos_token": None, "eos_token": special[-1], "pad_token": special[0]} | config
    if template is not None:
        names["chat_template"] = template
    return _files(spec, names)


def metaspace(
    template: str | None = None, special: list[str] | None = None, **more: dict
) -> dict[str, bytes]:
    """As Llama-2, Mistral and Gemma: U+2581 for a space, bytes where a character has no piece."""
    special = special or ["<unk>", "<s>", "</s>"]
    pieces, merges = _merges(WORDS, "\u2581")
    letters = sorted({c for word in WORDS for c in word} | set("\u2581.,![]/INSTabcdefgh"))
    names = [*special, *(f"<0x{b:02X}>" for b in range(256)), *letters, *pieces]
    bar = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = {
        "added_tokens": _added(special, 0),
        "pre_tokenizer": bar,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }
    end = {"__type": "AddedToken", "content": special[2]}
    config = {"bos_token": special[1], "eos_token": end, "unk_token": "<unk>"}
    if template is not None:
        config["chat_template"] = [
            {"name": "tools", "template": "x"},
            {"name": "default", "template": template},
        ]
    return _files(spec, config, **more)


def wordpiece() -> dict[str, bytes]:
    """As BERT: words, and their continuations after ##."""
    letters = [chr(c) for c in range(97, 123)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    names += [*WORDS, "##s", *".,!?'-"]
    return {"vocab.txt": "\n".join(dict.fromkeys(names)).encode() + b"\n"}


CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nhello world<|im_end|>\n' }}{% endif %}"
    + CHATML
)
MARKED = """{%- for turn in messages %}
    {{- '<|im_start|>' + turn.role + '\n' }}
    {%- if turn.role == 'assistant' %}
        {%- generation %}{{ turn.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- turn.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = (
    "{{ bos_token }}{% for turn in messages %}{{ '<|header|>' + turn['role'] + '<|/header|>\n\n' "
    "+ turn['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{% if messages and messages[0]['role'] == 'system' %}
{% set opening = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}
{% else %}
{% set opening = '' %}{% set turns = messages %}
{% endif %}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('turns must alternate, a user first') }}
{% elif turn['role'] == 'user' %}
{% set here = opening if loop.index0 >= turns | length - 2 else '' %}
{{ '[INST] ' + here + turn['content'] + ' [/INST]' -}}
{% else %}
{{ ' ' + turn['content'] + eos_token -}}
{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'system' %}"
    "{{ raise_exception('no system message, please') }}{% endif %}"
    "{{ '<turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' "
    "+ turn['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
THINKING = """{%- for turn in messages %}
    {%- set said = turn.content %}
    {%- if turn.role == 'assistant' and '</think>' in said and not loop.last %}
        {%- set said = said.split('</think>')[-1].lstrip('\n') %}
    {%- elif turn.role == 'assistant' and loop.last and '</think>' not in said %}
        {%- set said = '<think>\n\n</think>\n\n' + said %}
    {%- endif %}
    {{- '<|im_start|>' + turn.role + '\n' + said + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

GEMMA_SPECIAL = ["<unk>", "<bos>", "<eos>", "<turn>", "</turn>"]
TOKENIZERS = {
    "chatml": byte_level(template=CHATML),
    "default system": byte_level(template=DEFAULT_SYSTEM),
    "marked": byte_level(template=MARKED),
    "thinking": byte_level(template=THINKING),
    "llama3": byte_level(LLAMA3_SPECIAL, LLAMA3, bos_token="<|begin|>", eos_token="<|end_of_text|>"),
    "mistral": metaspace(MISTRAL),
    "gemma": metaspace(GEMMA, GEMMA_SPECIAL, generation_config={"eos_token_id": [2, 4]}),
}
DIALOGUES = [
    [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "the cat sat."}],
    [
        {"role": "user", "content": "  the cat 好\n"},
        {"role": "assistant", "content": "sat\n\n hello 😀 "},
        {"role": "user", "content": "end?"},
        {"role": "assistant", "content": "é the end"},
    ],
    [
        {"role": "system", "content": "the system"},
        {"role": "user", "content": "\n<b>tags</b>"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "world"},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "sat"},
    ],
]
"""Without control tokens in their contents, which transformers would obey."""
