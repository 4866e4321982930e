"""Sentences with a tag for each word: CoNLL column files, tag schemes, labels at one subword per word.

A tag is `O`, or a kind and a type, as `B-PER`, or a kind alone where all entities are of one type.
Inside the code tags are BIO (IOB2: every entity begins with B); other schemes are turned into it when a
file is read. Entities of ill-formed sequences are those of conlleval (Tjong Kim Sang and Buchholz 2000)
and of seqeval's default mode.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.config import Classifier, Tagged
from jaxgpt.data.lines import numbered_lines
from jaxgpt.data.packing import Item
from jaxgpt.data.readers.labels import known_labels, split_files
from jaxgpt.data.sources import expand
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".conll", ".tsv", ".bio", ".iob", ".iob2", ".bioes", ".bmes", ".ner")
Scheme = Literal["iob1", "bio", "bioes", "bilou", "bmes"]
_KINDS: dict[str, str] = {"iob1": "BIO", "bio": "BIO", "bioes": "BIOES", "bilou": "BILOU", "bmes": "BMOES"}
_TAG = re.compile("O|[BIMESLU](-.+)?")
DOCUMENT = "-DOCSTART-"
"""In place of a word where a document of CoNLL-2003 begins."""
_LAST, _ALONE = "EL", "SU"
"""Kinds that end an entity, and that are a whole one: of BIOES and BMES, of BILOU."""


@dataclass(frozen=True)
class TaggedSentence:
    """Words and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        words, tags = len(self.words), len(self.tags)
        require(words == tags, f"a sentence has {words} words and {tags} tags; give each word one tag.")


# ------------------------------------------------------------------------------------- the schemes


def _split(tag: str) -> tuple[str, str]:
    """Kind and type of a tag; the type of `O` is empty, and of a kind alone."""
    require(
        is_tag(tag),
        f"tag {tag!r} fits no scheme; allowed: O, and B, I, M, E, S, L or U alone or with a type, as B-PER.",
    )
    return tag[0], tag[2:]


def _begins(kind: str, type_: str, before: tuple[str, str]) -> bool:
    """Whether a tag that is not O begins an entity, by the kind and the type of the tag before it."""
    return kind in "B" + _ALONE or before[0] in "O" + _LAST + _ALONE or before[1] != type_


def scheme_of(tags: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that the tags of all sentences are written in.

    M is only of BMES, L and U of BILOU; E and S without M are of BIOES. Of the rest, IOB1 (the original
    files of CoNLL-2003) is where I begins entities and B only separates two neighbours of one type.

    Raises:
      UserError: a tag of no scheme; tags of two schemes.
    """
    named: dict[str, str] = {}
    inside_begins = b_begins = False
    for sentence in tags:
        before = ("O", "")
        for tag in sentence:
            kind, type_ = _split(tag)
            named.setdefault(kind, tag)
            inside_begins |= kind == "I" and _begins(kind, type_, before)
            b_begins |= kind == "B" and _begins("I", type_, before)
            before = kind, type_
    for scheme, own in (("bmes", "M"), ("bilou", "LU"), ("bioes", "ES")):
        found = [named[kind] for kind in own if kind in named]
        if not found:
            continue
        other = [tag for kind, tag in named.items() if kind not in _KINDS[scheme]]
        require(
            not other,
            f"tags {found[0]!r} and {''.join(other[:1])!r} are of different schemes ({scheme} has "
            f"{', '.join(_KINDS[scheme])}); write them in one.",
        )
        return scheme
    return "iob1" if inside_begins and not b_begins else "bio"


def to_bio(tags: Sequence[str], scheme: Scheme) -> list[str]:
    """The tags of one sentence as BIO, with the same entities.

    Any sequence is read as conlleval would: what cannot go on an entity begins one.

    Raises:
      UserError: a tag that the scheme does not have.
    """
    require_known(scheme, _KINDS, f"tag scheme {scheme!r} is unknown")
    made, before = [], ("O", "")
    for tag in tags:
        kind, type_ = _split(tag)
        require(kind in _KINDS[scheme], f"tag {tag!r} is not of the scheme {scheme} ({_KINDS[scheme]}).")
        letter = "O" if kind == "O" else "B" if _begins(kind, type_, before) else "I"
        made.append(_tag(letter, type_))
        before = kind, type_
    return made


def label_set(sentences: Iterable[TaggedSentence]) -> tuple[str, ...]:
    """`O`, then B-X and I-X of each type X of entities, sorted; B and I of entities without a type."""
    used = {tag for sentence in sentences for tag in sentence.tags}
    types = sorted({type_ for kind, type_ in map(_split, used) if kind != "O"})
    return ("O", *(_tag(kind, type_) for type_ in types for kind in "BI"))


def _tag(kind: str, type_: str) -> str:
    return f"{kind}-{type_}" if type_ else kind


# --------------------------------------------------------------------------------------- the files


def read_conll(paths: Iterable[str | Path]) -> list[TaggedSentence]:
    """The sentences of column files, folders or globs, their tags as BIO.

    A line is a word, any other columns, and the tag; sentences are separated by blank lines and by the
    `-DOCSTART-` lines of CoNLL-2003. A line with a tab in it has its columns between tabs (so that
    a space can be a word), another between runs of spaces. A file's scheme is found and logged. In
    folders and globs, `SUFFIXES` are read; a file named itself may have any suffix.

    Raises:
      UserError: a file that cannot be read or holds no sentence; a bad line.
    """
    sources = list(map(str, paths))
    named = [source for source in sources if Path(source).expanduser().is_file()]
    found = set(expand(named, ("",))) if named else set[str]()
    if len(named) < len(sources) or not sources:
        found.update(expand([source for source in sources if source not in named], SUFFIXES))
    sentences: list[TaggedSentence] = []
    for path in sorted(found):
        read = list(_read_file(path))
        require(bool(read), f"{path} holds no sentence; fill it or leave it out.")
        try:
            scheme = scheme_of(sentence.tags for sentence in read)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        log.info("%s: %d sentences, tags in the scheme %s", path, len(read), scheme)
        sentences += [TaggedSentence(s.words, tuple(to_bio(s.tags, scheme))) for s in read]
    return sentences


def _read_file(path: str) -> Iterator[TaggedSentence]:
    """The sentences with the tags as they stand."""
    words: list[str] = []
    tags: list[str] = []
    last = columns = 0
    for number, line in numbered_lines(path):
        try:
            word, tag, count = _columns(line)
            columns = columns or count
            if count and count != columns:
                raise ValueError(
                    f"{count} columns, but the lines before have {columns}; the last one is the tag"
                )
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"{path}:{number} is not UTF-8 (byte 0x{byte:02x}); convert the file, as with iconv."
            ) from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        start = word == DOCUMENT
        if words and (start or number > last + 1):  # blank lines are only seen in the numbers
            yield TaggedSentence(tuple(words), tuple(tags))
            words, tags = [], []
        if not start:
            words.append(word)
            tags.append(tag)
        last = number
    if words:
        yield TaggedSentence(tuple(words), tuple(tags))


def _columns(line: bytes | None) -> tuple[str, str, int]:
    """Word, tag and number of columns of a line (0 of a `-DOCSTART-`); `ValueError` where it has none."""
    columns = split_columns(line)
    if columns[0] == DOCUMENT:
        return columns[0], "O", 0
    require(
        len(columns) > 1,
        f"one column, {columns[0][:40]!r}; a line is a word and its tag (a space as a word needs a tab).",
    )
    _split(columns[-1])
    return columns[0], columns[-1], len(columns)


def split_columns(line: bytes | None) -> list[str]:
    """The columns of a line that is not blank, the first being a word; `ValueError` where it has none."""
    if line is None:
        raise ValueError("the line is too long for a word and its tag")
    # not str.split() and str.strip(): to them an ideographic space is a blank, here it is a word
    text = line.decode("utf-8").rstrip(" \t\r\n")
    columns = text.split("\t") if "\t" in text else re.split(" +", text.lstrip(" "))
    require(bool(columns[0]), "the word is empty; a line is a word and its tag.")
    return columns


def is_tag(text: str) -> bool:
    """Whether it is a tag of any scheme."""
    return bool(_TAG.fullmatch(text))


# ------------------------------------------------------------------------------------- the subwords


def align(
    sentence: TaggedSentence,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    length: int,
    joiner: str,
    at: Literal["first", "last"] = "first",
) -> list[Item]:
    """The sentence as `<|bos|> words <|eos|>`, each word's label at its first or last token.

    Every word has exactly one weighted token, in the order of the words (Devlin et al. 2019, section
    5.3), so that the predictions there, over all pieces, are the predictions of the words. A word
    that encodes to nothing is `<|mask|>`, from which BERT was trained to tell what may stand there,
    or without one `<|pad|>`, which stands for nothing; `<|eos|>` would end the sentence in its midst.

    Args:
      sentence: words and BIO tags.
      tokenizer: makes the tokens of each word by itself.
      labels: a target is a tag's place in them.
      length: maximum number of tokens in a piece. A longer sentence is cut between words into several, a
        longer word after its first tokens.
      joiner: put before every word but the first: " ", or "" where words are characters.
      at: the token of a word that has its label: the first, as BERT, or the last, as causal models need,
        which have not read the word at its first.

    Raises:
      UserError: a tag that is not in `labels`; a length below 3.
    """
    require(length >= 3, f"length is {length}; a word with its control tokens needs at least 3.")
    control, number = tokenizer.control, {label: i for i, label in enumerate(labels)}
    nothing = control.get("<|mask|>", control["<|pad|>"])
    texts = [joiner * (i > 0) + word for i, word in enumerate(sentence.words)]
    pieces: list[list[tuple[int, int, float]]] = []
    for ids, tag in zip(tokenizer.encode_batch(texts), sentence.tags, strict=True):
        require_known(tag, number, f"tag {tag!r} is not one of the model's labels")
        kept = (ids or [nothing])[: length - 2]
        if not pieces or len(pieces[-1]) + len(kept) > length - 2:
            pieces.append([])
        word = [(token, 0, 0.0) for token in kept]
        place = 0 if at == "first" else -1
        word[place] = (kept[place], number[tag], 1.0)
        pieces[-1] += word
    made = []
    for piece in pieces:
        whole = [(control["<|bos|>"], 0, 0.0), *piece, (control["<|eos|>"], 0, 0.0)]
        tokens, targets, weights = map(list, zip(*whole, strict=True))
        made.append(Item(tokens, targets, weights))
    return made


# --------------------------------------------------------------------------------------- the splits


def asked_token(data: Tagged, task: Classifier) -> Literal["first", "last"]:
    """The token of a word at which its tag is predicted; see `Tagged.align`."""
    if data.align != "auto":
        return data.align
    return "last" if task.backbone.causal else "first"


def encode(
    data: Tagged, tokenizer: Tokenizer, length: int, split: str, task: Classifier
) -> tuple[list[TaggedSentence], list[list[Item]]]:
    """The sentences of a split (`train`, `validation`, `test`), and the items that each was encoded to.

    Raises:
      UserError: the split names no files; a tag that the model does not know.
    """
    sentences = read_conll(split_files(data, split))
    used = {tag for sentence in sentences for tag in sentence.tags}
    labels = known_labels(split, used, label_set(sentences), task)
    at = asked_token(data, task)
    return sentences, [align(s, tokenizer, labels, length, data.joiner, at) for s in sentences]
