"""What the JSON files of a Hugging Face tokenizer may hold, as far as we read them."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**23)]
"""Of a token: memory for as many is taken, and the largest vocabularies have some 2**18."""
IdText = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,7}$")]
Vocabulary = Annotated[dict[str, Id], msgspec.Meta(min_length=1)]
Merge = Annotated[str, msgspec.Meta(pattern=" ")] | tuple[str, str]
Scored = Annotated[list[tuple[str, float]], msgspec.Meta(min_length=1)]
Flag = bool | None


class Added(TypedDict):
    """An entry of `added_tokens` of tokenizer.json."""

    id: Id
    content: str


class Step(TypedDict, total=False):
    """A normalizer, pre-tokenizer or decoder, or a sequence of them."""

    type: str
    decoders: list[Step]
    pretokenizers: list[Step]
    normalizers: list[Step]
    content: str
    prefix: str
    cleanup: Flag
    prepend_scheme: str
    add_prefix_space: Flag
    start: int


class Model(TypedDict):
    """The model of tokenizer.json."""

    vocab: Vocabulary | Scored
    merges: NotRequired[list[Merge]]
    unk_token: NotRequired[str | None]


class Spec(TypedDict):
    """tokenizer.json; the tokenizers library checks the rest."""

    model: Model
    added_tokens: NotRequired[list[Added] | None]
    normalizer: NotRequired[Step | None]
    pre_tokenizer: NotRequired[Step | None]
    decoder: NotRequired[Step | None]


class Token(TypedDict, total=False):
    """A token with the flags of its matching."""

    content: str | None


class Template(TypedDict, total=False):
    """One of several chat templates."""

    name: str
    template: str


AnyToken = str | Token


class Config(TypedDict, total=False):
    """tokenizer_config.json, special_tokens_map.json or chat_template.json."""

    bos_token: AnyToken | None
    eos_token: AnyToken | None
    unk_token: AnyToken | None
    sep_token: AnyToken | None
    pad_token: AnyToken | None
    cls_token: AnyToken | None
    mask_token: AnyToken | None
    additional_special_tokens: list[AnyToken] | None
    extra_special_tokens: list[AnyToken] | dict[str, AnyToken] | None
    added_tokens_decoder: dict[IdText, AnyToken] | None
    chat_template: str | list[Template] | None
    tokenizer_class: str | None
    add_bos_token: Flag
    add_prefix_space: Flag
    do_lower_case: Flag
    tokenize_chinese_chars: Flag
    strip_accents: Flag


SCHEMAS: dict[str, Any] = {
    "tokenizer.json": Spec,
    "vocab.json": Vocabulary,
    "added_tokens.json": dict[str, Id],
    "tokenizer_config.json": Config,
    "special_tokens_map.json": Config,
    "chat_template.json": Config,
}
"""By the file's name; of the others, only that they hold an object."""
