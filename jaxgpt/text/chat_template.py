"""Chat templates of Hugging Face tokenizers: Jinja as transformers runs it, with a loss mask.

The mask. A template that marks answers with `{% generation %}` is taken at its word. Otherwise the
answer of turn i is what stands between `render(messages[:i], add_generation_prompt=True)`, which
is what a model is given, and the end-of-turn token in `render(messages[:i + 1])`, provided that both
are prefixes of the whole rendering. Where they are not (Qwen3 drops the thoughts of earlier turns,
Mistral moves the system message to the last question), that turn as it stands is nothing the model
would ever be asked to write after such a prompt, so it is not trained; the last turn nearly always is. A
dialogue with no such turn is refused. Comparing renderings rather than searching for the contents
keeps this right for templates that trim contents or put text of their own into an answer.

Control tokens typed by a user. Every control token's name in a content is broken by a character
that Unicode keeps for internal use, so that the template sees nearly the same content (it may trim
or split it) and the tokenizer later knows the names that the template wrote from those it was
given. The rendering without those characters must equal that of the real contents.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxgpt.errors import UserError, require, require_known

if TYPE_CHECKING:
    from jinja2.parser import Parser

log = logging.getLogger(__name__)

_OPEN, _CLOSE, _GUARD = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters: never in exchanged text
_INTERNAL = re.compile(f"[{_OPEN}-{_GUARD}]")
_BROKEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of its expressions
ROLES = ("system", "user", "assistant")
"""Who speaks in a dialogue."""
Messages = Sequence[Mapping[str, str]]
Span = tuple[int, int]


class Names(Protocol):
    """What a template needs of its tokenizer; see `HFTokenizer`."""

    roles: dict[str, str]
    special: dict[str, int]

    def broken(self, text: str, guard: str) -> str: ...

    def end_of_turn(self, text: str, start: int) -> int: ...

    def rendered(
        self, text: str, spans: Sequence[Span] = (), guard: str = ""
    ) -> tuple[list[int], list[float]]: ...


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the text between, put between two marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """A chat template and the tokenizer whose special tokens it names.

    Dates that it asks for are of the moment when it was made, so that they stay the same for as long
    as a process runs.

    Args:
      source: Jinja.
      tokenizer: gives `bos_token`, `eos_token`, ... as far as it has them, and the ids.
      where: names the tokenizer in errors.

    Raises:
      UserError: the source is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Names, where: str = "the tokenizer") -> None:
        now = datetime.datetime.now()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson  # jinja's own escapes HTML
        self.source, self._tokenizer, self._where, self._told = source, tokenizer, where, False
        try:
            self._compiled = environment.from_string(
                source, globals={"raise_exception": _refuse, "strftime_now": now.strftime}
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is not valid ({error}); mend it.") from None

    def text(self, messages: Messages, prompt: bool) -> str:
        """The rendering, with the marks of `{% generation %}` in it.

        Args:
          messages: turns of `role` and `content`.
          prompt: whether the opening of the assistant's next turn follows.

        Raises:
          UserError: the template refuses the dialogue.
        """
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self._tokenizer.roles,
            )
        except (jinja2.TemplateError, *_BROKEN) as error:
            turns = ", ".join(message["role"] for message in messages) or "no turns"
            raise UserError(
                f"the chat template of {self._where} refuses a dialogue of {turns} ({error}); change the "
                "dialogue or leave it out."
            ) from None

    def example(self, messages: Messages) -> tuple[list[int], list[float]]:
        """The ids of a whole dialogue and their weights: 1 on the answers and what ends them.

        Raises:
          UserError: the template refuses the dialogue, or does not let the answers be told apart.
        """
        guarded = _guarded(messages, self._tokenizer)
        text, spans = _unmark(self._faithful(messages, guarded, prompt=False))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answers and not spans:
            require("endgeneration" not in self.source, self._unclear("marks none of the answers"))
            spans = self._answers(guarded, answers, text)
            if not spans and answers[-1] < len(messages) - 1:  # a question without an answer is no loss
                return self.example(messages[: answers[-1] + 1])
            require(bool(spans), self._unclear("renders no answer as what its prompt opens"))
        return self._tokenizer.rendered(text, spans, _GUARD)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids after which the assistant's next answer begins."""
        guarded = _guarded(messages, self._tokenizer)
        text, _ = _unmark(self._faithful(messages, guarded, prompt=True))
        return self._tokenizer.rendered(text, (), _GUARD)[0]

    def end_of_answers(self) -> str | None:
        """The control token that the template writes after an answer, if it writes one."""
        answer = "answer 7319"
        try:
            text, _ = _unmark(
                self.text(
                    [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}], False
                )
            )
        except UserError:
            return None
        after = text.rfind(answer) + len(answer)
        if after < len(answer):
            return None
        tail = text[after : self._tokenizer.end_of_turn(text, after)]
        return next((name for name in self._tokenizer.special if tail.endswith(name)), None)

    def _faithful(self, messages: Messages, guarded: Messages, prompt: bool) -> str:
        """The rendering of the guarded contents, checked against that of the real ones."""
        text = self.text(guarded, prompt)
        if guarded != messages:
            require(
                text.replace(_GUARD, "") == self.text(messages, prompt),
                f"a dialogue holds the name of a control token in its text, which the chat template of "
                f"{self._where} acts upon; remove the name from the dialogue.",
            )
        return text

    def _answers(self, messages: Messages, turns: Sequence[int], whole: str) -> list[Span]:
        """Where the answers stand in the whole rendering, by comparing renderings of its turns."""
        found = [self._answer(messages, i, whole) for i in turns]
        spans = [span for span in found if span is not None]
        if len(spans) < len(found) and not self._told:
            self._told = True
            log.warning(
                "the chat template of %s changes earlier turns as a dialogue goes on: answers that it "
                "changed are not trained, later ones are",
                self._where,
            )
        return spans

    def _answer(self, messages: Messages, i: int, whole: str) -> Span | None:
        try:
            before = self.text(messages[:i], True)
            after = whole if i == len(messages) - 1 else self.text(messages[: i + 1], False)
        except UserError:  # a template may refuse a part of a dialogue that it takes whole
            return None
        if not whole.startswith(after):
            after = after.rstrip()  # white space after a turn may depend on whether another follows
        if not whole.startswith(after) or not after.startswith(before) or len(after) <= len(before):
            return None
        return len(before), self._tokenizer.end_of_turn(after, len(before))

    def _unclear(self, what: str) -> str:
        return (
            f"the chat template of {self._where} {what}, so nothing tells what to train; put "
            "{% generation %} and {% endgeneration %} around the answers in it."
        )


def _guarded(messages: Messages, tokenizer: Names) -> list[dict[str, str]]:
    guarded = []
    for message in messages:
        role, content = message["role"], message["content"]
        require_known(role, ROLES, f"role {role!r} is unknown")
        found = _INTERNAL.search(content)
        require(
            found is None,
            f"a dialogue holds U+{ord(found[0]) if found else 0:04X}, a code point that Unicode keeps for "
            "internal use and the chat template needs; remove it.",
        )
        guarded.append({"role": role, "content": tokenizer.broken(content, _GUARD)})
    return guarded


def _unmark(text: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the spans that they enclosed."""
    plain, spans, at = list[str](), list[Span](), 0
    for i, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", text)):
        if i % 2:
            spans.append((at, at + len(part)))
        plain.append(part)
        at += len(part)
    return "".join(plain), spans
