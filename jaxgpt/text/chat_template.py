"""Chat templates of Hugging Face tokenizers: Jinja as transformers runs it, with a loss mask.

The mask. The loss weight is 1 on every answer and on the control token that ends it: on what a model
would have to write after the prompt that the template gives it. Where that begins and ends is not
searched for by the answer's text, which the template may trim or change, but told by a second rendering
in which the answer is another (one character that no text holds): both agree up to the answer and from
its end on, and what the template writes around an answer is known from a probe (chat_form.py). A
template whose answers cannot be distinguished so is refused, unless it marks them with `{% generation %}`:
then it is taken at its word, less what opens an answer and with what ends it.

Control tokens typed by a user. Every control token's name in a turn is broken by a character
that Unicode keeps for internal use, so that the template sees nearly the same content (it may trim
or split it) and the tokenizer later knows the names that the template wrote from those it was
given. The rendering without those characters must equal that of the real turns.

Nothing is dropped in silence: a role or a part of a turn that makes no difference to what the template
writes is refused by name, except those of `OWN_KEYS`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import parse_json
from jaxgpt.text.chat_form import Form, agree, probe
from jaxgpt.text.jinja import Jinja, Messages, Rendering
from jaxgpt.text.jinja_worker import CLOSE, OPEN

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
"""Who speaks in a dialogue."""
OWN_KEYS = frozenset({"role", "content", "learn", "name", "tool_call_id"})
"""Of a turn; what a template does with any other must make a difference."""
MARK = "\ufdd4"
"""Begins a dialogue that was written as a text; see `chat.prompt_text`."""
_GUARD, _SENTINEL = "\ufdd2", "\ufdd3"
_INTERNAL = re.compile("[\ufdd0-\ufdd4]")  # noncharacters: never in exchanged text
_AT_ONCE = 4_000_000  # characters that renderings of one request have together, or it is one rendering
Span = tuple[int, int]
Turns = list[dict[str, Any]]


class Names(Protocol):
    """What a template needs of its tokenizer; see `HFTokenizer`."""

    roles: dict[str, str]
    special: dict[str, int]

    def broken(self, text: str, guard: str) -> str: ...

    def rendered(
        self, text: str, spans: Sequence[Span] = (), guard: str = ""
    ) -> tuple[list[int], list[float]]: ...


class ChatTemplate:
    """A chat template and the tokenizer whose special tokens it names.

    A message has `role` and `content`, `learn: False` where an answer is not trained; the rest is passed on.

    Args:
      source: Jinja.
      tokenizer: gives `bos_token`, `eos_token`, ... as far as it has them, and the ids.
      where: names the tokenizer in errors.

    Raises:
      UserError: the source is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Names, where: str = "the tokenizer") -> None:
        self.source, self._tokenizer, self._where = source, tokenizer, where
        self._jinja = Jinja(source, tokenizer.roles, where)
        self._control = re.compile("|".join(map(re.escape, tokenizer.special)) or "(?!)")
        self._objects: bool | None = None  # whether it takes arguments of calls as objects
        self._marked, self._told, self._known = "endgeneration" in source, False, set[tuple[str, str]]()

    @cached_property
    def form(self) -> Form:
        """What the template writes around answers; see `probe`."""

        def texts(renderings: Sequence[Rendering]) -> list[str | UserError]:
            found = self._jinja.render(renderings)
            return [text if isinstance(text, UserError) else _plain(text) for text in found]

        return probe(texts, self._tokenizer.special)

    def text(self, messages: Messages, prompt: bool) -> str:
        """The rendering, with the marks of `{% generation %}` in it.

        Args:
          messages: turns.
          prompt: whether the opening of the assistant's next turn follows.

        Raises:
          UserError: the template refuses the dialogue.
        """
        return _text(self._jinja.render([(messages, prompt)])[0])

    def example(self, messages: Messages) -> tuple[list[int], list[float]]:
        """The ids of a whole dialogue and their weights: 1 on the answers and what ends them.

        Raises:
          UserError: the template refuses the dialogue, or does not let the answers be distinguished.
        """
        real, guarded = self._turns(messages)
        require(not self.form.lost, self._unclear(self.form.lost))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [i for i in answers if messages[i].get("learn", True)]
        told = [] if self._marked else learned
        several = 1 + _AT_ONCE // (1 + sum(len(message["content"]) for message in guarded))
        whole, first = self._faithful(real, guarded, False, [_answered(guarded, i) for i in told[:several]])
        text, spans = _unmark(whole)
        if self._marked:
            spans = self._marks(text, spans, answers, learned)
        elif learned:
            require(not self.form.problem, self._unclear(self.form.problem))
            spans = []
            for i, other in zip(learned, chain(first, self._others(guarded, told, several)), strict=True):
                floor = spans[-1][1] if spans else 0
                called = isinstance(other, UserError) and bool(guarded[i].get("tool_calls"))
                span = self._call(guarded, i, text) if called else self._answer(text, _plain(other), floor)
                spans.append(span)
                self._tell(guarded[i]["content"], text[slice(*spans[-1])])
        return self._tokenizer.rendered(text, spans, _GUARD)

    def _others(self, guarded: Turns, told: list[int], several: int) -> Iterator[str | UserError]:
        """The renderings with the sentinel for one answer each, but for the first, several at a time."""
        for start in range(several, len(told), several):
            part = told[start : start + several]
            yield from self._jinja.render([(_answered(guarded, i), False) for i in part])

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes the tools that it is told of."""
        tool = {"type": "function", "function": {"name": _SENTINEL, "description": "", "parameters": {}}}
        ask = {"role": "user", "content": "a"}
        dialogues = [([ask], True), ([{"role": "system", "content": "a"}, ask], True)]
        return any(
            isinstance(text, str) and _SENTINEL in text for text in self._jinja.render(dialogues, [tool])
        )

    def prompt(self, messages: Messages, tools: Turns | None = None) -> str:
        """The text after which the assistant's next answer begins, for `ids`.

        Args:
          messages: turns.
          tools: that the model may call, as OpenAI writes them.

        Raises:
          UserError: the template refuses the dialogue or leaves out the tools, or these name control tokens.
        """
        if tools:
            where = f"the chat template of {self._where}"
            require(self.takes_tools, f"{where} leaves out tools; write them into a turn.")
            require(
                _each(tools, self.guarded) == tools,
                f"a tool holds the name of a control token, which {where} would write; rename it.",
            )
        text, _ = self._faithful(*self._turns(messages), prompt=True, tools=tools or [])
        require(not self.form.lost, f"the chat template of {self._where} {self.form.lost}; fix it.")
        return _plain(text) + self.form.added

    def unfinished(self, messages: Messages) -> str:
        """The text of a dialogue whose last turn is not ended, for `ids`."""
        real, guarded = self._turns(messages)
        text, others = self._faithful(real, guarded, False, [_answered(guarded, len(guarded) - 1)])
        text = _plain(text)
        return text[: self._inner(text, _plain(others[0]))[1]]

    def ids(self, text: str) -> list[int]:
        """The ids of what `prompt` or `unfinished` gave, followed by `guarded` texts."""
        return self._tokenizer.rendered(text, (), _GUARD)[0]

    def end_of_answers(self) -> str | None:
        """The control token that the template writes after an answer, if it writes one."""
        try:
            ends = self.form.ends
        except UserError:
            return None
        return next((name for end in ends for name in self._tokenizer.special if end.endswith(name)), None)

    # ------------------------------------------------------------------------------- what is given

    def _turns(self, messages: Messages) -> tuple[Turns, Turns]:
        """What the template is given, and the same with guards in the names of control tokens."""
        for message in messages:
            require_known(message["role"], ROLES, f"role {message['role']!r} is unknown")
        given = [{key: value for key, value in m.items() if key != "learn"} for m in messages]
        real = self._arguments(given)
        guarded = [
            {key: value if key == "role" else _each(value, self.guarded) for key, value in m.items()}
            for m in real
        ]
        for i, message in enumerate(guarded):
            if message["role"] in ("system", "tool"):
                self._check_role(guarded, i)
            for key in message.keys() - OWN_KEYS:
                if message[key]:
                    self._check_key(guarded[: i + 1], key)
        return real, guarded

    def _arguments(self, given: Turns) -> Turns:
        """The turns with the arguments of calls as objects where they are JSON text, as templates expect.

        But for a template that fails on objects, or writes them as Python's, which takes the text.
        """
        parsed = [_parsed(turn) for turn in given]
        if parsed == given:
            return given
        if self._objects is None:
            i = next(i for i, turn in enumerate(given) if turn != parsed[i])
            objects, texts = self._jinja.render([(parsed[: i + 1], False), (given[: i + 1], False)])
            python = [str(call["function"]["arguments"]) for call in parsed[i]["tool_calls"]]
            fits = isinstance(objects, str) and not any(text in objects for text in python if text != "{}")
            self._objects = fits or isinstance(texts, UserError)
        return parsed if self._objects else given

    def _check_role(self, messages: Turns, i: int) -> None:
        """Refuse a role whose turns the template leaves out, or takes for another's."""
        role = messages[i]["role"]
        known = (role, "first" if i == 0 else "later")
        if known in self._known:
            return
        turn = messages[i] | {"content": _SENTINEL}
        others = ("assistant",) if role == "system" else ("assistant", "user")
        written, *taken = self._jinja.render(
            [(_changed(messages, i, turn | {"role": other}), False) for other in (role, *others)]
        )
        where = f"the chat template of {self._where}"
        fix = "use a template that knows the role, or leave these turns out."
        require(_SENTINEL in _text(written), f"{where} leaves out turns of the role {role!r}; {fix}")
        for other, text in zip(others, taken, strict=True):
            require(
                text != written, f"{where} writes turns of the role {role!r} as those of {other!r}; {fix}"
            )
        self._known.add(known)

    def _check_key(self, messages: Turns, key: str) -> None:
        """Refuse what the last turn has and the template leaves out."""
        turn, earlier = messages[-1], messages[:-1]
        known = (turn["role"], f"{key}, content" if turn["content"] else key)
        if known in self._known:
            return
        bare = {name: value for name, value in turn.items() if name != key}
        other = turn | {"content": _SENTINEL}
        with_key, without, beside = self._jinja.render([([*earlier, t], False) for t in (turn, bare, other)])
        if isinstance(with_key, UserError):  # a part of the dialogue; the whole may do
            return
        where, fix = f"the chat template of {self._where}", "use another template, or leave it out."
        require(
            with_key != without, f"{where} leaves out {key!r} of a turn of the role {turn['role']!r}; {fix}"
        )
        seen = not turn["content"] or isinstance(beside, UserError) or _SENTINEL in beside
        require(seen, f"{where} leaves out the content of a turn that has {key!r} too; {fix}")
        self._known.add(known)

    def guarded(self, text: str) -> str:
        """A text in which nothing becomes a control token by `ids`."""
        found = _INTERNAL.search(text)
        require(
            found is None,
            f"a dialogue holds U+{ord(found[0]) if found else 0:04X}, a code point that Unicode keeps for "
            "internal use and the chat template needs; remove it.",
        )
        return self._tokenizer.broken(text, _GUARD)

    # ------------------------------------------------------------------------------- what is learned

    def _faithful(
        self,
        real: Turns,
        guarded: Turns,
        prompt: bool,
        others: Sequence[Messages] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> tuple[str, list[str | UserError]]:
        """The rendering of the guarded turns, checked against that of the real ones; then the others'."""
        checked = [real] if real != guarded else []
        found = self._jinja.render([(turns, prompt) for turns in (guarded, *checked, *others)], tools)
        whole = _text(found[0])
        for text in found[1 : 1 + len(checked)]:
            require(
                whole.replace(_GUARD, "") == _text(text),
                f"a dialogue holds the name of a control token in its text, which the chat template of "
                f"{self._where} acts upon; remove the name from the dialogue.",
            )
        return whole, found[1 + len(checked) :]

    def _inner(self, whole: str, other: str) -> Span:
        """Where a turn's own text stands in the whole: where another rendering has the sentinel."""
        once = "does not write the text of each turn exactly once"
        require(other.count(_SENTINEL) == 1, self._unclear(once))
        before, after = other.split(_SENTINEL)
        require(
            whole.endswith(after), self._unclear("writes what follows an answer otherwise for another answer")
        )
        stop = len(whole) - len(after)
        start = len(before) if whole.startswith(before) else agree(whole, before)
        return min(start, stop), stop

    def _answer(self, whole: str, other: str, floor: int) -> Span:
        """Where an answer stands, its end included."""
        inner = self._inner(whole, other)
        start, stop = self.form.start(whole, floor, inner[0]), self.form.end(whole, inner[1])
        if start is None:
            opened = self.form.opening + self.form.given
            raise UserError(
                self._unclear(f"ends a prompt with {opened!r} but writes an answer without it before")
            )
        if stop is None:
            after = whole[inner[1] : inner[1] + 40]
            raise UserError(
                self._unclear(f"writes {after!r} after an answer, where no control token ends it")
            )
        return start, stop

    def _call(self, turns: Turns, i: int, whole: str) -> Span:
        """Where an answer stands that calls a tool, in a template that wants a call before the tool's turn.

        No other text can stand in its place, so its prompt and the dialogue up to it are rendered.
        """
        prompt, after = map(_plain, self._jinja.render([(turns[:i], True), (turns[: i + 1], False)]))
        prompt, after = prompt + self.form.added, after.rstrip()
        ends = [found.end() for found in self._control.finditer(after, len(prompt))]
        known = whole.startswith(after) and after.startswith(prompt) and ends and ends[-1] == len(after)
        require(bool(known), self._unclear("writes a call of a tool otherwise than where its prompt ends"))
        return len(prompt), len(after)

    def _marks(self, whole: str, spans: list[Span], answers: list[int], learned: list[int]) -> list[Span]:
        """The marked stretches of the answers that are learned, each from its opening to its end."""
        if not learned:
            return []
        require(bool(spans), self._unclear("marks none of the answers"))
        if len(learned) < len(answers):
            several = f"marks {len(spans)} stretches of text in a dialogue of {len(answers)} answers"
            require(len(spans) == len(answers), self._unclear(several))
            spans = [span for i, span in zip(answers, spans, strict=True) if i in learned]
        if len(spans) > len(answers):  # some mark the end of the whole text too
            spans = [(a, b) for a, b in spans if self._control.sub("", whole[a:b]).strip()]
        return [self._mended(whole, *span) for span in spans]

    def _mended(self, whole: str, start: int, stop: int) -> Span:
        """A marked stretch, less what opens an answer, up to the control token that ends it."""
        start = self.form.skip(whole, start, stop)
        if (end := self.form.end(whole, stop)) is not None:
            return start, end
        for end in self.form.ends:
            at = whole.rfind(end, start, stop)
            if at >= 0 and not self._control.sub("", whole[at + len(end) : stop]).strip():
                return start, at + len(end)
        return start, stop

    def _tell(self, content: str, written: str) -> None:
        if not self._told and content.strip() not in written:
            self._told = True
            log.warning(
                "the chat template of %s writes some answers otherwise than they are given (it may leave out "
                "the thoughts of earlier turns); they are trained as it writes them",
                self._where,
            )

    def _unclear(self, what: str) -> str:
        return (
            f"the chat template of {self._where} {what}, so what to train cannot be told; fix the template, "
            "or put {% generation %} and {% endgeneration %} around the answers in it."
        )


def _text(rendered: str | UserError) -> str:
    if isinstance(rendered, UserError):
        raise rendered
    return rendered


def _plain(rendered: str | UserError) -> str:
    """The text without marks, unless it is an error."""
    return _unmark(_text(rendered))[0]


def _changed(messages: Turns, i: int, turn: dict[str, Any]) -> Turns:
    return [*messages[:i], turn, *messages[i + 1 :]]


def _answered(messages: Turns, i: int) -> Turns:
    return _changed(messages, i, {"role": messages[i]["role"], "content": _SENTINEL})


def _parsed(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with the arguments of its calls as objects, where they are the JSON text of one."""

    def parsed(call: Any) -> Any:
        try:
            function = call["function"]
            arguments = parse_json(function["arguments"], dict[str, Any], "arguments", "fix it")
        except (UserError, LookupError, TypeError):  # objects already, or what no template takes
            return call
        return call | {"function": function | {"arguments": arguments}}

    calls = turn.get("tool_calls")
    return turn | {"tool_calls": [parsed(call) for call in calls]} if isinstance(calls, list) else turn


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each(inner, change) for key, inner in value.items()}
    return [_each(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _unmark(text: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the spans that they enclosed."""
    if OPEN not in text:
        return text, []
    plain, spans, at = list[str](), list[Span](), 0
    for i, part in enumerate(re.split(f"[{OPEN}{CLOSE}]", text)):
        if i % 2:
            spans.append((at, at + len(part)))
        plain.append(part)
        at += len(part)
    return "".join(plain), spans
