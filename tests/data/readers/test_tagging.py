"""Tags: whatever the scheme, the entities are seqeval's; whatever the length, no word is lost."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOB2, IOBES, Tokens

from jaxgpt.config import GPT, Classifier, Tagged, from_json, to_json
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.tagging import (
    TaggedSentence,
    align,
    encode,
    label_set,
    read_conll,
    scheme_of,
    to_bio,
)
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer

quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
types = st.sampled_from(["PER", "LOC", "A-B"])


def tags_of(kinds: str):
    """Any sequence over the kinds, ill-formed ones among them."""
    named = st.builds("{}-{}".format, st.sampled_from(kinds.replace("O", "")), types)
    return st.lists(st.just("O") | named, max_size=12)


chunks = st.lists(st.tuples(st.sampled_from(["O", "PER", "LOC"]), st.integers(1, 4)), max_size=6)


def write_tags(parts, scheme: str) -> list[str]:
    """A well-formed sequence of the scheme: each part is a type and its length in words."""
    tags, before = [], "O"
    for type_, size in parts:
        letters = {"bmes": ("M", "S", "E"), "bilou": ("I", "U", "L")}
        inside, one, last = letters.get(scheme, ("I", "S", "E"))
        if type_ == "O":
            tags += ["O"] * size
        elif scheme == "iob1":
            tags += [f"{'B' if before == type_ else 'I'}-{type_}"] + [f"I-{type_}"] * (size - 1)
        elif scheme == "bio":
            tags += [f"B-{type_}"] + [f"I-{type_}"] * (size - 1)
        elif size == 1:
            tags.append(f"{one}-{type_}")
        else:
            tags += [f"B-{type_}", *[f"{inside}-{type_}"] * (size - 2), f"{last}-{type_}"]
        before = type_
    return tags


def spans(parts) -> list[tuple[str, int, int]]:
    """The entities that `write_tags` wrote."""
    found, at = [], 0
    for type_, size in parts:
        found += [(type_, at, at + size - 1)] if type_ != "O" else []
        at += size
    return found


# ------------------------------------------------------------------------------------- the schemes


@quick
@given(
    st.sampled_from(["iob1", "bio", "bioes"]).flatmap(
        lambda s: st.tuples(st.just(s), tags_of("BIOES" if s == "bioes" else "BIO"))
    )
)
def test_any_sequence_has_the_entities_that_seqeval_reads(case):
    scheme, tags = case
    made = to_bio(tags, scheme)
    assert get_entities(made) == get_entities(tags)
    assert to_bio(made, "bio") == made
    strict = [(e.tag, e.start, e.end - 1) for e in Tokens(made, IOB2).entities]
    assert strict == get_entities(tags)  # well-formed: the strict mode finds what the default does


@quick
@given(tags_of("BMOES"))
def test_bmes_is_bioes_with_another_letter(tags):
    inside = [f"I{tag[1:]}" if tag[0] == "M" else tag for tag in tags]
    assert to_bio(tags, "bmes") == to_bio(inside, "bioes")


@quick
@given(chunks, st.sampled_from(["iob1", "bio", "bioes", "bilou", "bmes"]))
def test_well_formed_tags_keep_their_entities(parts, scheme):
    tags = write_tags(parts, scheme)
    assert get_entities(to_bio(tags, scheme)) == spans(parts)
    assert get_entities(to_bio(tags, scheme_of([tags]))) == spans(parts)


@quick
@given(chunks)
def test_the_schemes_that_seqeval_reads_strictly_agree(parts):
    for scheme, strict in (("iob1", IOB1), ("bioes", IOBES)):
        found = Tokens(write_tags(parts, scheme), strict).entities
        assert [(e.tag, e.start, e.end - 1) for e in found] == spans(parts)


@quick
@given(st.lists(chunks, min_size=1, max_size=4))
def test_schemes_are_found(sentences):
    tell = [("PER", 3), ("PER", 3), ("O", 1), ("LOC", 1)]  # has every letter of every scheme
    for scheme in ("iob1", "bio", "bioes", "bilou", "bmes"):
        assert scheme_of([write_tags(parts, scheme) for parts in [*sentences, tell]]) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["O", "O"], "bio"),
        (["B-X", "O"], "bio"),
        (["I-X", "I-X", "B-X"], "iob1"),
        (["I-X", "O", "B-X"], "bio"),  # ill-formed: in IOB1 this B- would be I-
        (["B-X", "I-Y"], "bio"),
        (["I-X", "O"], "iob1"),
        (["B-X", "E-X"], "bioes"),
        (["S-X"], "bioes"),
        (["B-X", "M-X"], "bmes"),
    ],
)
def test_schemes_of_few_tags(tags, scheme):
    assert scheme_of([tags]) == scheme


def test_labels_are_o_then_each_types_two():
    sentence = TaggedSentence(("a", "b", "c"), ("O", "B-PER", "B-A-B"))
    assert label_set([sentence]) == ("O", "B-A-B", "I-A-B", "B-PER", "I-PER")
    assert label_set([]) == ("O",)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scheme_of([["B-X", "M-X"], ["I-Y"]]), "tags 'M-X' and 'I-Y' are of different schemes"),
        (lambda: scheme_of([["O", "X-PER"]]), "tag 'X-PER' fits no scheme; allowed: O, and B, I"),
        (lambda: to_bio(["E-X"], "bio"), "tag 'E-X' is not of the scheme bio"),
        (lambda: to_bio(["O"], "iob"), "tag scheme 'iob' is unknown; did you mean 'iob1'"),
        (lambda: TaggedSentence(("a",), ()), "1 words and 0 tags"),
    ],
)
def test_mistakes_in_tags_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


# --------------------------------------------------------------------------------------- the files

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
Smith NNP I-NP B-PER
"""
SENTENCES = [
    TaggedSentence(("EU", "rejects", "German", "call"), ("B-ORG", "O", "B-MISC", "O")),
    TaggedSentence(("Peter", "Blackburn", "Smith"), ("B-PER", "I-PER", "B-PER")),
]


@pytest.mark.parametrize("change", [
    lambda text: text.encode(),
    lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace(" ", "\t").encode(),
    lambda text: text.replace("\n\n", "\n \n\t\n").encode(),
    lambda text: text.replace("\nPeter", "\n-DOCSTART- -X- O O\nPeter").rstrip("\n").encode(),
    lambda text: text.replace(" ", "   ").replace("\n", " \n").encode(),
], ids=["plain", "bom", "crlf", "tabs", "blanks", "docstart", "spaces"])  # fmt: skip
def test_conll_2003_in_all_its_looks(tmp_path, caplog, change):
    file = tmp_path / "eng.testa"  # named itself, so any suffix will do
    file.write_bytes(change(CONLL))
    with caplog.at_level(logging.INFO):
        assert read_conll([file]) == SENTENCES
    assert "2 sentences, tags in the scheme iob1" in caplog.text


# U+3000 is a word in Chinese files, U+0085 and U+2028 are line ends to str.splitlines
character = st.characters(exclude_categories=("Cs",), exclude_characters="\t\r\n")
word = st.text(character, min_size=1, max_size=4) | st.sampled_from([" ", "　", "\x85", "\u2028", "\ufeff"])
sentence = st.lists(st.tuples(word, st.sampled_from(["PER", "O"])), min_size=1, max_size=6)


@quick
@given(st.lists(sentence, min_size=1, max_size=4), st.sampled_from(["bio", "bmes"]), st.integers(0, 2))
@example([[("　", "O"), (" ", "PER")]], "bmes", 1)
def test_what_is_written_is_read(tmp_path, sentences, scheme, columns):
    words = [[w for w, _ in s] for s in sentences]
    tags = [write_tags([(t, 1) for _, t in s], scheme) for s in sentences]
    between = "\t" + "x\t" * columns
    lines = [
        "".join(f"{w}{between}{t}\n" for w, t in zip(*s, strict=True)) for s in zip(words, tags, strict=True)
    ]
    file = tmp_path / "a.tsv"
    file.write_bytes(("\n" + "\n".join(lines)).encode())  # a first line, for a word may be U+FEFF
    read = read_conll([file])
    assert [list(s.words) for s in read] == words
    assert [get_entities(list(s.tags)) for s in read] == [spans([(t, 1) for _, t in s]) for s in sentences]


def test_an_ideographic_space_is_a_word_between_spaces_too(tmp_path):
    (tmp_path / "a.char.bmes").write_text("　 O\n高 B-NAME\n勇 E-NAME\n", "utf-8")
    assert read_conll([tmp_path / "*.bmes"]) == [
        TaggedSentence(("　", "高", "勇"), ("O", "B-NAME", "I-NAME"))
    ]


def test_folders_hold_files_of_several_schemes(tmp_path):
    (tmp_path / "b.bio").write_text("a B-X\nb I-X\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.bmes").write_text("c B-X\nd M-X\ne E-X\n")
    (tmp_path / "notes.md").write_text("no column file\n")
    both = [
        TaggedSentence(("a", "b"), ("B-X", "I-X")),
        TaggedSentence(("c", "d", "e"), ("B-X", "I-X", "I-X")),
    ]
    assert read_conll([tmp_path]) == both
    assert read_conll([tmp_path, tmp_path / "b.bio"]) == both


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a O\nb\n", r"a\.txt:2: one column, 'b'; a line is a word and its tag"),
        (b"a O\n\nb X-PER\n", r"a\.txt:3: tag 'X-PER' fits no scheme; allowed: O, and B"),
        (b"a NN B-X\nb I-X\n", r"a\.txt:2: 2 columns, but the lines before have 3"),
        (b"a B-X\nb L-X\nc E-X\n", r"a\.txt: tags 'L-X' and 'E-X' are of different schemes"),
        (b"a B-\n", r"a\.txt:1: tag 'B-' fits no scheme"),
        (b"a O\n\tO\n", r"a\.txt:2: the word is empty"),
        (b"a O\n\xff O\n", r"a\.txt:2 is not UTF-8 \(byte 0xff\)"),
        (b"a M-X\nb I-X\n", r"a\.txt: tags 'M-X' and 'I-X' are of different schemes"),
        (b"\n-DOCSTART- O\n", r"a\.txt holds no sentence"),
        (b"", r"a\.txt is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_conll([tmp_path / "a.txt"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_conll([tmp_path / "none.txt"])
    with pytest.raises(UserError, match="no source is named"):
        read_conll([])


# ------------------------------------------------------------------------------------- the subwords

LABELS = ("O", "B-A-B", "I-A-B", "B-LOC", "I-LOC", "B-PER", "I-PER")
some_words = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=12)


@quick
@given(some_words, st.data(), st.integers(3, 24), st.sampled_from([" ", ""]))
def test_every_word_has_one_target_in_order_and_nothing_is_lost(tokenizer, words, data, length, joiner):
    tags = data.draw(st.lists(st.sampled_from(LABELS), min_size=len(words), max_size=len(words)))
    pieces = align(TaggedSentence(tuple(words), tuple(tags)), tokenizer, LABELS, length, joiner)
    bos, eos, mask = (tokenizer.control[f"<|{name}|>"] for name in ("bos", "eos", "mask"))
    targets, runs = [], []
    for tokens, numbers, weights, kinds, _ in pieces:
        assert len(tokens) == len(numbers) == len(weights) <= length
        assert (tokens[0], tokens[-1], weights[0], weights[-1], kinds) == (bos, eos, 0.0, 0.0, None)
        assert weights[1] == 1.0  # a piece begins with a word, never within one
        for token, number, weight in zip(tokens[1:-1], numbers[1:-1], weights[1:-1], strict=True):
            assert weight in (0.0, 1.0) and (weight or number == 0)
            if weight:
                targets.append(LABELS[number])
                runs.append([])
            runs[-1].append(token)
    assert targets == tags
    for i, (word, run) in enumerate(zip(words, runs, strict=True)):
        assert run == (tokenizer.encode(joiner * (i > 0) + word)[: length - 2] or [mask])
    for piece, after in pairwise(pieces):  # cut only where the next word would not fit
        first = 1 + [*after.weights[2:-1], 1.0].index(1.0)
        assert len(piece.tokens) + first > length


@quick
@given(some_words, st.integers(3, 24))
def test_the_last_token_of_a_word_has_its_target_where_that_is_asked_for(words, length):
    """The same pieces; only the place of each word's target differs: as far on as the word is long."""
    sentence = TaggedSentence(tuple(words), ("B-LOC",) * len(words))
    firsts, lasts = (align(sentence, ByteTokenizer(), LABELS, length, " ", at) for at in ("first", "last"))
    sizes = iter(len((" " * (i > 0) + w).encode()[: length - 2]) or 1 for i, w in enumerate(words))
    for first, last in zip(firsts, lasts, strict=True):
        assert first.tokens == last.tokens
        places = [i for i, weight in enumerate(first.weights) if weight]
        moved = [at + next(sizes) - 1 for at in places]
        assert [i for i, weight in enumerate(last.weights) if weight] == moved
        assert all(last.targets[i] == LABELS.index("B-LOC") for i in moved)


@pytest.mark.parametrize(
    ("causal", "align_", "place"),
    [(True, "auto", 3), (False, "auto", 1), (True, "first", 1), (False, "last", 3)],
)
def test_a_causal_model_is_asked_at_the_last_token_of_a_word(tmp_path, causal, align_, place):
    (tmp_path / "a.txt").write_text("Ann B-PER\n")
    backbone = GPT(vocab_size=264, context=16, layers=1, width=8, heads=1, causal=causal)
    data = Tagged(train=(str(tmp_path / "a.txt"),), validation=(str(tmp_path / "a.txt"),), align=align_)
    task = Classifier(backbone=backbone, labels=LABELS)
    _, [[item]] = encode(data, ByteTokenizer(), 16, "train", task)
    assert item.weights == [float(i == place) for i in range(5)]


def test_runs_stored_without_the_field_keep_the_first_token():
    stored = to_json(Tagged(train=("a",), validation=("b",)))
    assert from_json(Tagged, stored).align == "auto"
    del stored["align"]
    assert from_json(Tagged, stored).align == "first"


def test_labels_of_the_test_file_alone_are_told_before_training_and_kept_as_gold(tmp_path, caplog):
    for name, tag in (("train", "B-PER"), ("test", "B-XYZ")):
        (tmp_path / f"{name}.txt").write_text(f"Ann {tag}\nsaw O\n")
    files = {name: (str(tmp_path / f"{name}.txt"),) for name in ("train", "test")}
    data = Tagged(**files, validation=files["train"])
    backbone = GPT(vocab_size=264, context=16, layers=1, width=8, heads=1, causal=False)
    task = Classifier(backbone=backbone, labels=("O", "B-PER", "I-PER"))
    rows_of(data, ByteTokenizer(), 16, 0, 1, task)
    assert "data.test has labels that are not in model.labels" in caplog.text and "B-XYZ" in caplog.text
    sentences, _ = encode(data, ByteTokenizer(), 16, "test", task)
    assert [s.tags for s in sentences] == [("B-XYZ", "O")]
    narrow = replace(task, labels=("O", "B-LOC", "I-LOC"))
    with pytest.raises(UserError, match=r"set model.labels to \('O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER'\)"):
        encode(data, ByteTokenizer(), 16, "train", narrow)


def test_a_word_of_nothing_is_masked_where_the_tokenizer_can():
    tokenizer = ByteTokenizer()
    tokenizer.control = tokenizer.control | {"<|mask|>": 999}
    (piece,) = align(TaggedSentence(("", "a"), ("B-PER", "O")), tokenizer, LABELS, 8, "")
    assert piece.tokens[1:-1] == [999, ord("a")]
    assert piece.weights == [0, 1, 1, 0] and piece.targets == [0, LABELS.index("B-PER"), 0, 0]


def test_mistakes_in_alignment_are_named():
    sentence = TaggedSentence(("a",), ("B-PRE",))
    with pytest.raises(UserError, match="tag 'B-PRE' is not one of the model's labels; did you mean 'B-PER'"):
        align(sentence, ByteTokenizer(), LABELS, 8, " ")
    with pytest.raises(UserError, match="length is 2; a word with its control tokens needs at least 3"):
        align(sentence, ByteTokenizer(), LABELS, 2, " ")


@pytest.fixture(autouse=True)
def quiet():
    """seqeval warns of what it does not read as a tag."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
