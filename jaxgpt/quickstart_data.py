"""Text and instructions for `jaxgpt quickstart`, made from what every installation carries.

No network, no data file: the corpus is the documentation in the sources of the standard library
and of the packages jaxgpt depends on, read with `ast`, never imported. The instructions are text
skills with answers a program can check, questions about that documentation, and small talk; the
same from the same installation and seed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import inspect
import json
import os
import random
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The order decides what a small budget keeps: plain prose first, scipy's formulas last.
PACKAGES = ("jax", "flax", "optax", "orbax", "grain", "rich", "tyro", "numpy", "scipy")
DEFAULT_BUDGET = 6_000_000
_TARGET = 2_000  # characters per document
_SPARSE = 3_000  # characters of source a docstring, above which a file is not worth parsing
_REPEATS = 3  # how often one paragraph may appear before it counts as boilerplate
_SKIPPED = re.compile("(test|conftest).*|.*_test.*|__pycache__|_vendor|encodings|idlelib|lib2to3|.*-packages")
Turn, Example, _Counts = tuple[str, str, str], dict[str, Any], Counter[str]
_NOT_LETTERS = bytes(i for i in range(128) if not chr(i).isalpha() and chr(i) not in " \n")
_SENTENCE = r"[A-Z].{9,119}?(?<!\.\w)\.(?=\s|$)"  # short, and not cut at "e.g."
_COMMON = r"\b(the|a|an|of|to|is|are|and|in|for|if|that|be|with|by|from|it|or|on)\b"


class Entry(NamedTuple):
    """One docstring: the English paragraphs of it, and its first sentence ("" if not plain)."""

    module: str
    name: str  # dotted, beginning with the module
    text: str
    summary: str = ""


class Corpus(NamedTuple):
    """Documents to pretrain on, and what they were built from."""

    documents: tuple[str, ...]
    entries: tuple[Entry, ...]
    defined: Mapping[str, int]  # how many modules define a name
    report: Mapping[str, int]  # files, unreadable, docstrings, entries, documents, bytes


def corpus(budget: int = DEFAULT_BUDGET, packages: Sequence[str] = PACKAGES) -> Corpus:
    """Read the installed documentation, in a fixed order, up to `budget` UTF-8 bytes.

    Packages that are not installed are passed over. Raises ValueError where nothing is found
    (an installation that ships only compiled files, or a budget below one module's text).
    """
    counts, seen, defined = Counter[str](), Counter[str](), Counter[str]()
    entries: list[Entry] = []
    documents: list[str] = []
    for path, module in _sources(packages):
        found = _docstrings(path, module, counts, defined)
        kept = [entry for entry in (_clean(entry, seen) for entry in found) if entry]
        grouped = list(_group(kept))
        size = sum(len(document.encode()) for document in grouped)
        if counts["bytes"] + size > budget:
            break
        counts["bytes"] += size
        documents += grouped
        entries += kept
    if not documents:
        raise ValueError(f"no documentation found within {budget} bytes")
    counts.update(entries=len(entries), documents=len(documents))
    return Corpus(tuple(documents), tuple(entries), defined, dict(counts))


def _sources(packages: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Paths and module names: the standard library (with its help topics), then packages."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in packages:
        spec = importlib.machinery.PathFinder.find_spec(package)  # finds, does not import
        locations = spec.submodule_search_locations if spec else None
        roots += [(package, Path(location)) for location in locations or ()]
    for package, root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not _SKIPPED.fullmatch(name))
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix == ".py" and not _SKIPPED.fullmatch(path.stem):
                    parts = (package, *path.relative_to(root).with_suffix("").parts)
                    yield path, ".".join(p for p in parts if p and p != "__init__")


def _docstrings(path: Path, module: str, counts: _Counts, defined: _Counts) -> list[Entry]:
    """Every docstring of one file in source order, private ones too: they are English."""
    found: list[Entry] = []
    topics = module == "pydoc_data.topics"  # what help("assert") prints: one dict of strings

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}" if hasattr(node, "name") else name
            text = ast.get_docstring(node, clean=False)
            found.extend([Entry(module, name, text)] if text else [])
        elif topics and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts = ast.literal_eval(node.value).items()
            found.extend(Entry(module, topic, text) for topic, text in texts)
        for child in getattr(node, "body", ()):
            visit(child, name)

    counts.update(files=1, unreadable=0)
    try:
        source = path.read_text(encoding="utf-8")
        defined.update(set(re.findall(r"(?m)^ *(?:class|def|async def) (\w+)", source)))
        if source.count('"""') * _SPARSE >= 2 * len(source) or topics:  # parsing is what costs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                visit(ast.parse(source), module)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        counts["unreadable"] += 1
    counts["docstrings"] += len(found)
    return found


def _clean(entry: Entry, seen: _Counts) -> Entry | None:
    """The entry with its English paragraphs only, or None where too little is left of it."""
    text = re.sub(r":[a-z:]+:`~?([^`<]*?)(?: <[^`]*>)?`", r"`\1`", inspect.cleandoc(entry.text))
    text = re.sub(r" ?\[\d+\]_|^[ \t]*([-=*~^#+])\1{2,}[ \t]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!`)``(?!`)", "`", text)
    kept, summary = [], ""
    for i, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        paragraph = textwrap.dedent(paragraph).strip()
        key = re.sub(r"[\W\d_]+", " ", paragraph.lower())
        if _is_english(paragraph) and seen[key] < _REPEATS:
            seen[key] += 1
            if not re.search(r"\n(?=\s|[-*+] |\d+[.)] |[\w*, ]+ ?: )", paragraph):
                paragraph = " ".join(paragraph.split())  # hard-wrapped, and not a list
            kept.append(paragraph)
            if i == 0 and (sentence := re.match(_SENTENCE, paragraph)):
                summary = sentence[0]
        elif kept and kept[-1].endswith(":"):
            kept.pop()  # it announced what is dropped here
    text = "\n\n".join(kept)
    whole = "whole:" + re.sub(r"[\W\d_]+", " ", text.lower())
    seen[whole] += 1
    cleaned = Entry(entry.module, entry.name.replace("._src", ""), text, summary)
    return cleaned if len(text) >= 40 and seen[whole] == 1 else None


def _is_english(paragraph: str) -> bool:
    """Whether a paragraph reads as prose: not code, a table, a formula or another language."""
    if re.search(r"^(\.\. |\$ |@|\|)|>>>|```|\\", paragraph):
        return False
    letters = len(paragraph.encode("ascii", "ignore").translate(None, _NOT_LETTERS))
    code = sum(map(paragraph.count, "=(){}[]<>_/|#"))
    if letters < 0.8 * len(paragraph) - 3 or code > 0.06 * len(paragraph) + 2:
        return False
    words = len(re.findall("[a-z]+", paragraph.lower()))
    return 0 < words < 10 or len(re.findall(_COMMON, paragraph.lower())) > words / 12


def _group(entries: Sequence[Entry]) -> Iterator[str]:
    """Documents of about `_TARGET` characters: small docstrings together, long ones in parts."""
    blocks: list[str] = []
    for entry in entries:
        for i, paragraph in enumerate(entry.text.split("\n\n")):
            if blocks and sum(map(len, blocks)) + len(paragraph) > _TARGET:
                yield "\n\n".join(blocks)
                blocks = []
            blocks += [f"# {entry.name}"] * (i == 0 or not blocks) + [paragraph]
    if blocks:
        yield "\n\n".join(blocks)


class Skill(NamedTuple):
    """`skill(rng, words)` draws a question, its only right answer, and its words (sorted).

    Level 1 copies by place, 2 changes or compares, 3 needs how words are spelled. `make(rng, x,
    i)` gets distinct random words `x` and an index into all but the last, and returns the
    answer and what {0}, {1} of the phrasings show; lists are joined with commas.
    """

    name: str
    level: int
    sizes: tuple[int, int]  # of x
    make: Callable[[random.Random, list[str], int], tuple[str | Sequence[str], ...]]
    pool: int = 1_000  # x comes from the first `pool` words ...
    own: tuple[str, ...] = ()  # ... or from these

    def __call__(self, rng: random.Random, words: Sequence[str]) -> tuple[str, str, list[str]]:
        size = min(rng.randint(*self.sizes), rng.randint(*self.sizes))  # short ones more often
        x = rng.sample(self.own or words[: self.pool], size)
        made = self.make(rng, x, rng.randrange(max(1, size - 1)))
        lists = [[item] if isinstance(item, str) else item for item in made]
        answer, *given = map(", ".join, lists)
        question = rng.choice(_PHRASINGS[self.name]).format(*given)
        return question, answer, sorted(word for items in lists[1:] for word in items)


def _table(text: str) -> dict[str, list[str]]:
    return {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.strip().splitlines()}


_PHRASINGS = _table("""
repeat_words | Repeat these words: {0} | Say this back to me: {0} | Copy this list: {0}
first_word | What is the first word of {0}? | Which word comes first: {0}? | First word: {0}
last_word | What is the last word of {0}? | Which word comes last: {0}? | Last word: {0}
second_word | What is the second word of {0}? | Which word comes second: {0}? | Second word: {0}
quoted_word | Which word is in quotes: {0} | Find the quoted word: {0} | What is quoted here? {0}
word_after | Which word follows {1} in {0}? | In the list {0}, what comes right after {1}?
word_before | Which word precedes {1} in {0}? | In the list {0}, what comes right before {1}?
in_list | Is {1} in the list {0}? | Does the list {0} contain {1}? | Yes or no: is {1} in {0}?
pattern | Continue the pattern: {0} | What comes next? {0} | Give the next word: {0}
count_words | How many words are in this list: {0}? | Count the words: {0} | Count: {0}
reverse_words | Reverse the order: {0} | Write this list backwards: {0} | Reverse: {0}
remove_word | Remove {1} from {0}. | Leave {1} out: {0} | What is left of {0} without {1}?
next_number | What is the next number: {0}? | Continue counting: {0} | Which number follows {0}?
opposites | Give the opposites of these words: {0} | What is the opposite of each: {0}?
days | Which day comes {1} each of these: {0}? | Name the day {1} each: {0}
alphabetical | Put in alphabetical order: {0} | Sort these words: {0} | Order from a to z: {0}
first_letters | Give the first letter of each word: {0} | Which letters begin these words: {0}?
uppercase | Write in capital letters: {0} | Put in upper case: {0} | Capitals, please: {0}
described | What does `{0}` do? | What is `{0}`? | Describe `{0}`. | What is `{0}` for?
holder | Which module holds `{0}`? | Where do I find `{0}`? | From which module comes `{0}`?
""")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_POLES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "old": "new",
    "high": "low",
    "long": "short",
    "open": "closed",
    "left": "right",
    "up": "down",
    "good": "bad",
    "early": "late",
    "empty": "full",
}
_POLES |= {value: key for key, value in _POLES.items()}


def _next_number(rng: random.Random, x: list[str], i: int) -> tuple[str, list[str]]:
    start, step = rng.randint(0, 40), rng.choice((1, 2, 5, 10))
    *shown, last = (str(start + step * k) for k in range(rng.randint(4, 5)))
    return last, shown


def _days(rng: random.Random, x: list[str], i: int) -> tuple[list[str], list[str], str]:
    step, when = rng.choice(((1, "after"), (-1, "before")))
    return [_DAYS[(_DAYS.index(day) + step) % 7] for day in x], x, when


def _in_list(rng: random.Random, x: list[str], i: int) -> tuple[str, list[str], str]:
    return ("yes", x[1:], x[i + 1]) if rng.random() < 0.5 else ("no", x[1:], x[0])


# A skill whose answer is no copy draws from a small pool, so that each word is met often.
_ALL = (
    Skill("repeat_words", 1, (2, 4), lambda r, x, i: (x, x)),
    Skill("first_word", 1, (2, 5), lambda r, x, i: (x[0], x)),
    Skill("last_word", 1, (2, 5), lambda r, x, i: (x[-1], x)),
    Skill("second_word", 1, (3, 5), lambda r, x, i: (x[1], x)),
    Skill("quoted_word", 1, (4, 6), lambda r, x, i: (x[i], [*x[:i], f'"{x[i]}"', *x[i + 1 : -1]])),
    Skill("word_after", 1, (3, 5), lambda r, x, i: (x[i + 1], x, x[i])),
    Skill("word_before", 1, (3, 5), lambda r, x, i: (x[i], x, x[i + 1])),
    Skill("pattern", 1, (3, 4), lambda r, x, i: (x[i], (x[:-1] * 3)[: 2 * len(x) - 2 + i])),
    Skill("in_list", 2, (4, 6), _in_list),
    Skill("count_words", 2, (1, 6), lambda r, x, i: (str(len(x)), x)),
    Skill("reverse_words", 2, (2, 3), lambda r, x, i: (x[::-1], x)),
    Skill("remove_word", 2, (4, 5), lambda r, x, i: (x[:i] + x[i + 1 : -1], x[:-1], x[i])),
    Skill("next_number", 2, (0, 0), _next_number),
    Skill("opposites", 2, (2, 3), lambda r, x, i: ([_POLES[w] for w in x], x), 0, (*_POLES,)),
    Skill("days", 2, (2, 3), _days, 0, _DAYS),
    Skill("alphabetical", 3, (2, 2), lambda r, x, i: (sorted(x), x), pool=60),
    Skill("first_letters", 3, (2, 3), lambda r, x, i: ([w[0] for w in x], x), pool=60),
    Skill("uppercase", 3, (2, 2), lambda r, x, i: ([w.upper() for w in x], x), pool=40),
)
SKILLS: dict[str, Skill] = {skill.name: skill for skill in _ALL}
_WEIGHTS = {1: 1.0, 2: 2.0, 3: 1.5}  # of a skill's level among the training examples
_MORE = {"documentation": 0.15, "small_talk": 0.05}  # of training turns, to 1 of all skills
_TURNS = (85, 10, 5)  # per cent of the training examples with one, two, three turns
_SMALL_TALK = _table("""
Hello! How can I help you? | Hello | Hello! | Hi | Hi there! | Good morning
I am jaxgpt, a small language model. | Who are you? | What are you? | What is your name?
You are welcome! | Thanks | Thank you! | Thanks a lot! | Great, thank you.
I know short word tasks and some Python documentation. | What can you do? | Can you help me?
""")
_JARGON = """args argument async bool config dict dtype dtypes float func https init int ints jax
kwargs len metadata ndarray numpy param params pytree pytrees scipy str tuple tuples vmap """


def word_pool(documents: Iterable[str], size: int = 100) -> list[str]:
    """Return the lower-case words of 3 to 8 letters that most documents hold, in that order.

    Left out: jargon, and the words questions are made of, so that none reads ambiguously.
    """
    asked = " ".join(" ".join(_PHRASINGS[name]) for name in SKILLS)
    reserved = set(re.findall("[a-z]+", (_JARGON + _COMMON + asked).lower()))
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(set(re.findall(r"(?<![\w.`'\"-])[a-z]{3,8}(?![\w.`'\"(-])", document)))
    return sorted(counts.keys() - reserved, key=lambda word: (-counts[word], word))[:size]


def _split(seed: int, *key: str) -> str:
    """Where a task belongs, by a digest of what it is about: 80, 10 and 10 per cent."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return ("test", "validation", *["train"] * 8)[int.from_bytes(digest[:4], "big") % 10]


def _facts(corpus: Corpus, seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """By split: (kind of question, name, answer) for what is public and not too long to say."""
    facts: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": [], "test": []}
    for entry in corpus.entries:
        parent, _, last = entry.name.rpartition(".")
        mine = facts[_split(seed, "documentation", last)]
        public = not re.search(r"(^|[./])_|topics", f"{entry.module}/{entry.name}")
        if public and len(entry.name) < 40:
            mine += [("described", entry.name, entry.summary)] if entry.summary else []
            sure = parent == entry.module and corpus.defined[last] == 1
            sure = sure and parent.split(".")[0] not in PACKAGES  # which re-export a lot
            mine += [("holder", last, f"`{parent}`")] if sure else []
    return facts


class _Source:
    """Draws turns: (skill, question, answer). `held` are the questions it has held out."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.seed, self.held = seed, set[str]()
        self.words, self.facts = word_pool(corpus.documents), _facts(corpus, seed)

    def turn(self, rng: random.Random, split: str, skill: str) -> Turn | None:
        """A turn of this split; None where it has no question of this skill left."""
        if skill == "small_talk":
            answer = rng.choice(list(_SMALL_TALK))
            return skill, rng.choice(_SMALL_TALK[answer]), answer
        if skill == "documentation":
            kind, name, answer = rng.choice(self.facts[split])
            return skill, rng.choice(_PHRASINGS[kind]).format(name), answer
        for _ in range(500):
            question, answer, arguments = SKILLS[skill](rng, self.words)
            key = " ".join(question.lower().split())
            if _split(self.seed, skill, *arguments) == split and key not in self.held:
                self.held.update([key] * (split != "train"))
                return skill, question, answer
        return None


def _example(*turns: Turn) -> Example:
    pairs = [(("user", question), ("assistant", answer)) for _, question, answer in turns]
    messages = [{"role": role, "content": content} for pair in pairs for role, content in pair]
    return {"messages": messages, "skill": turns[0][0] if len(turns) == 1 else "dialogue"}


def instructions(
    corpus: Corpus, n_train: int, n_test: int, seed: int = 0, skills: Iterable[str] | None = None
) -> tuple[list[Example], list[Example], list[Example]]:
    """Chat examples: `n_train` to train on, `n_test` to validate on, `n_test` to test on.

    The test asks single questions of `skills` (default: all) in equal parts where enough exist.
    None of its questions, and no set of words a skill is asked about in it, is in training or
    validation; likewise for validation, a third of which asks about documented names unknown to
    training. Training may repeat a question. Raises ValueError where this cannot be had.
    """
    names, source = list(SKILLS if skills is None else skills), _Source(corpus, seed)
    if not SKILLS.keys() >= set(names) or len(source.words) < 60 or not all(source.facts.values()):
        raise ValueError(f"a corpus too poor, or skills not among {list(SKILLS)}: {names}")
    examples: dict[str, list[Example]] = {"test": [], "validation": []}
    for split, found in examples.items():
        rng = random.Random(f"{seed}/{split}")
        left = names + ["documentation"] * (len(names) // 2) * (split == "validation")
        while left and len(found) < n_test:
            if turn := source.turn(rng, split, skill := left.pop(0)):
                left.append(skill)
                found.append(_example(turn))
        if len(found) < n_test:
            raise ValueError(f"{names} have {len(found)} {split} questions, not {n_test}")
    rng = random.Random(f"{seed}/train")
    weights = [_WEIGHTS[SKILLS[name].level] for name in names]
    weights += [share * sum(weights) for share in _MORE.values()]
    train = []
    for _ in range(n_train):
        kinds = rng.choices([*names, *_MORE], weights, k=rng.choices((1, 2, 3), _TURNS)[0])
        train.append(_example(*filter(None, (source.turn(rng, "train", kind) for kind in kinds))))
    return train, examples["validation"], examples["test"]


def is_correct(example: Example, answer: str) -> bool:
    """Whether a model's answer is the example's last message, but for spaces around it."""
    return answer.strip() == example["messages"][-1]["content"].strip()
