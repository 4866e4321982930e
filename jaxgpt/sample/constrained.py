"""Rules that a completion keeps: allowed answers, a regular expression, a JSON schema or a grammar.

By llguidance, a rule becomes a grammar of bytes, and a `Guide` says before every token of its row which ones
it leaves. The compiled step takes that as an array (`program.Rows.allowed_BV`); nothing is called back from
the device.
Shapes: B rows, V vocabulary of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import UserError, require, shown
from jaxgpt.text.tokenizer import Tokenizer, utf8

_HEAD = '%llguidance {"no_forcing": true}\n'  # else one spelling alone of what must come is allowed
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Rule(NamedTuple):
    """What a text may be; make one with `choices`, `regex`, `json_schema` or `grammar`.

    Attributes:
      body: of a rule of a grammar, as llguidance's dialect of Lark has it.
      said: the rule in messages.
      free: whether it begins with any text, a space before it or none.
    """

    body: str
    said: str
    free: bool = False


def choices(answers: Sequence[str]) -> Rule:
    """One of these texts.

    Raises:
      UserError: there is none, or an empty one.
    """
    require(bool(answers) and all(answers), f"choices is {shown(answers)}; give texts, none of them empty.")
    for answer in answers:
        utf8(answer)
    return Rule(f"/{'|'.join(map(_literal, answers))}/", f"choices {shown(answers)}")


def regex(pattern: str) -> Rule:
    """A text that the regular expression matches as a whole, in the syntax of Rust's `regex`: that of Python
    without look-around and back-references.

    Raises:
      UserError: it is empty or no regular expression.
    """
    require(bool(pattern), "regex is empty; write a regular expression.")
    utf8(pattern)
    return _checked(Rule(f"/{_library().regex_to_lark(pattern, '')}/", f"regex {shown(pattern)}"))


def json_schema(schema: Mapping[str, Any] | bool) -> Rule:
    """JSON that a schema allows, on one line, spaced as Python's `json` does (`x-guidance` changes that).

    Raises:
      UserError: it is no JSON schema, or has keywords that llguidance does not follow.
    """
    if isinstance(schema, Mapping):
        own = schema.get("x-guidance")
        schema = {**schema, "x-guidance": _COMPACT | (dict(own) if isinstance(own, Mapping) else {})}
    return _checked(Rule(f"%json {json.dumps(schema)}", "json_schema"))


def grammar(text: str) -> Rule:
    """A text of a context-free grammar in llguidance's dialect of Lark, which begins with its rule `start`.

    Raises:
      UserError: it is empty or no grammar.
    """
    require(bool(text.strip()), "grammar is empty; write rules, the first of them named start.")
    utf8(text)
    return _checked(Rule(f"%lark {{\n{text}\n}}", "grammar"))


def after_mark(opening: str, inner: Rule, closing: str, said: str, otherwise: Rule | None = None) -> Rule:
    """Any text, but what `opening` begins follows another rule up to `closing`, as often as it comes.

    Args:
      opening, closing: marks; white space may stand beside them, inside.
      inner: what stands between.
      said: the rule in messages.
      otherwise: what a text without marks is, where not anything; one with marks then has nothing else.
    """
    marked = f"SPACE {inner.body} SPACE {json.dumps(closing)}\nSPACE: /[ \\n]{{0,2}}/"
    if otherwise is None:
        text = f"start: marked* TEXT\nTEXT: /(.|\\n)*/\nmark[lazy]: /(.|\\n)*{_literal(opening)}/"
    else:
        text = f"start: other | (marked SPACE)+\nother: {otherwise.body}\nmark: {json.dumps(opening)}"
    return Rule(f"%lark {{\n{text}\nmarked: mark {marked}\n}}", said, free=otherwise is None)


class Guide:
    """One row's way through a rule.

    Args:
      rule: what its text may be.
      tokenizer: of the tokens.
      stops: ids that end the row: they may come where the text may end, and nowhere else.
      size: V; ids beyond the tokenizer's are not allowed.
      leads: whether the tokenizer drops a space where this text begins, so that one is to be written.

    Raises:
      UserError: the rule is too complex, or no id ends the row.
    """

    def __init__(
        self, rule: Rule, tokenizer: Tokenizer, stops: Collection[int], size: int, leads: bool = False
    ) -> None:
        require(bool(stops), f"{rule.said} needs a token that ends the text, but stop names none; give one.")
        self._rule, self._stops, self._size = rule, sorted(stops), size
        self._matcher = _library().LLMatcher(_vocabulary(tokenizer), _grammar(rule, leads), log_level=0)
        self._check()

    def allowed(self) -> np.ndarray:
        """The tokens [V] that may come next, bool; at least one."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        found_V = np.zeros(self._size, bool)
        found_V[: len(found)] = found
        found_V[self._stops] = self._matcher.is_accepting()
        require(
            bool(found_V.any()),
            f"{self._rule.said} cannot be followed: the tokenizer has no token for what must come next.",
        )
        return found_V

    def feed(self, token: int) -> None:
        """Go on with a token of those allowed."""
        if token not in self._stops:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(_why(self._rule, self._matcher.get_error()))


class Guides:
    """The guides of a batch.

    Args:
      guides: of each row; None where it is free.
      shape: B and V.
    """

    def __init__(self, guides: Sequence[Guide | None], shape: tuple[int, int]) -> None:
        self._guides = {i: guide for i, guide in enumerate(guides) if guide is not None}
        self._shape = shape

    def first(self) -> np.ndarray:
        """What may come first in each row [B, V]."""
        allowed_BV = np.ones(self._shape, bool)
        for i, guide in self._guides.items():
            allowed_BV[i] = guide.allowed()
        return allowed_BV

    def next(self, made: Any) -> np.ndarray:
        """What may come next in each row [B, V], after the one token that was made since the last call.

        Args:
          made: `program.Made` on the host.
        """
        allowed_BV = np.ones(self._shape, bool)
        for i, guide in self._guides.items():
            if not made.done_B[i]:  # else nobody asks any more
                guide.feed(int(made.tokens_BS[i, made.length_B[i] - 1]))
                allowed_BV[i] = guide.allowed()
        return allowed_BV


def each_rule(rules: Rule | Sequence[Rule | None] | None, rows: int) -> list[Rule | None]:
    """The rule of every row, of one for all or one for each."""
    return [rules] * rows if rules is None or isinstance(rules, Rule) else [*rules]


def _literal(text: str) -> str:
    """A regular expression for this text alone."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/#&~-]", r"\\\g<0>", text).replace("\n", r"\n").replace("\r", r"\r")


def _grammar(rule: Rule, leads: bool) -> str:
    spaced = leads and not rule.free
    return _HEAD + (f'start: " " text\ntext: {rule.body}' if spaced else f"start: {rule.body}")


def _checked(rule: Rule) -> Rule:
    """The rule, if it can be followed."""
    if why := _library().LLMatcher.validate_grammar(_grammar(rule, False)):
        raise UserError(_why(rule, why))
    return rule


def _why(rule: Rule, error: str) -> str:
    lines = (line.strip() for line in error.partition("<state>")[0].splitlines())
    what = [line for line in lines if line and set(line) - set("^ ")]
    short = next((line for line in what if line.startswith("error:")), what[0] if what else "no reason given")
    return f"{rule.said} cannot be followed ({short.removeprefix('error: ').rstrip('.'):.200}); simplify it."


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance has it: the bytes of each id, none of a control token."""
    library = _library()

    class Wrapped:
        eos_token_id = tokenizer.stop_ids[0]
        bos_token_id = None
        tokens = tuple(tokenizer.piece_bytes(i) for i in range(tokenizer.vocab_size))
        special_token_ids = ()

        def __call__(self, text: Any) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))

    return library.LLTokenizer(
        library.TokenizerWrapper(Wrapped()), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.stop_ids[0]
    )


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "rules for completions need llguidance, which is not installed; run "
            "`pip install 'jaxgpt[constrained]'`."
        ) from None
    return llguidance
