"""What a chat template writes around an answer, found by rendering a few dialogues once.

Each turn of these is a single character that no text holds, so that what stands between two turns is
known exactly. Nothing is taken from the template's source, and its word (`add_generation_prompt`) is
compared with what it does: templates that always open an answer, or never do, are distinguished.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from jaxgpt.errors import UserError
from jaxgpt.text.jinja import Rendering

QUESTION, ANSWER, SECOND, LAST, SYSTEM = "\ufdd3", "\ufdd4", "\ufdd5", "\ufdd6", "\ufdd7"
Render = Callable[[Sequence[Rendering]], "list[str | UserError]"]


@dataclass(frozen=True)
class Form:
    """Where an answer begins and ends.

    Attributes:
      opening: the text that opens an answer; empty where the question's end is all that precedes one.
      lead: what follows before the answer's own text (a space, an empty thought): the model writes it.
      given: what a prompt has after `opening` and an answer must begin with (`<think>`).
      added: what a prompt lacks since the template never writes it: `opening`, or nothing.
      ends: what may follow an answer's text, each up to and including the control token that ends it.
      problem: why answers cannot be distinguished, as words after "the template"; else empty.
      lost: what of a dialogue the template leaves out, in the same way.
    """

    opening: str = ""
    lead: str = ""
    given: str = ""
    added: str = ""
    ends: tuple[str, ...] = ()
    problem: str = ""
    lost: str = ""

    def start(self, whole: str, floor: int, text: int) -> int | None:
        """Where an answer begins; None where it does not begin as its prompt ends.

        Args:
          whole: a rendering.
          floor: where the answer before it ended.
          text: where its own text begins, or earlier: the last opening before that is the template's.
        """
        if not self.opening:
            return text - len(self.lead) if whole.endswith(self.lead, floor, text) else text
        at = whole.rfind(self.opening, floor, text)
        if at < 0 or not whole.startswith(self.given, at + len(self.opening)):
            return None
        return at + len(self.opening + self.given)

    def skip(self, whole: str, start: int, stop: int) -> int:
        """Where an answer begins that is marked from `start` to `stop`, perhaps with its prompt's end."""
        if self.opening:
            at = whole.find(self.opening, max(0, start - len(self.opening)), stop)
            start = at + len(self.opening) if 0 <= at <= start else start
        return start + len(self.given) if whole.startswith(self.given, start, stop) else start

    def end(self, whole: str, text: int) -> int | None:
        """Where an answer ends whose own text ends at `text`: after the control token that ends it."""
        return next((text + len(end) for end in self.ends if whole.startswith(end, text)), None)


def probe(render: Render, control: Collection[str]) -> Form:
    """What a template writes around answers.

    Args:
      render: gives the text of each rendering, or why there is none.
      control: names of control tokens.

    Raises:
      UserError: as `render`.
    """
    ask, answer = _turn("user", QUESTION), _turn("assistant", ANSWER)
    for first in ([], [_turn("system", SYSTEM)]):  # some want a system message
        one = [*first, ask, answer]
        two = [*one, _turn("user", SECOND), _turn("assistant", LAST)]
        asked, prompt, once, twice, none = render(
            [([*first, ask], False), ([*first, ask], True), (one, False), (two, False), ([], False)]
        )
        if isinstance(prompt, str) and isinstance(once, str):
            break
    else:
        return Form(
            problem=f"takes no question with its answer ({prompt if isinstance(once, str) else once})"
        )
    if QUESTION not in prompt or ANSWER not in once:
        lost = "leaves out the text of turns (perhaps it wants a list of parts in place of each text)"
        return Form(problem=lost, lost=lost)
    if prompt.count(QUESTION) != 1 or not once.count(QUESTION) == once.count(ANSWER) == 1:
        return Form(problem="does not write the text of each turn exactly once")
    units = _Units(control)
    closed, middle = _after(asked, QUESTION), _after(twice, ANSWER)
    before, tail = once.split(ANSWER)
    form = _opening(closed, prompt.split(QUESTION)[1], before.split(QUESTION)[-1], units)
    if form.problem:
        return form
    always = not form.opening and closed == prompt.split(QUESTION)[1]  # it may open an answer in any case
    closed, middle = closed or "", "" if middle is None else middle.split(SECOND)[0]
    opened = ""
    if always and not middle.startswith(tail):
        opened = units.opened([none] if isinstance(none, str) else [], closed, tail, middle)
    ends = units.ends(closed.removesuffix(opened), tail.removesuffix(opened), middle)
    what = (
        "its end and the opening of another cannot be distinguished" if opened else "no control token ends it"
    )
    problem = "" if ends else f"writes {tail[:60]!r} after an answer, where {what}"
    return replace(form, ends=ends, problem=problem)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _after(text: str | UserError, mark: str) -> str | None:
    return text.split(mark)[-1] if isinstance(text, str) and text.count(mark) == 1 else None


def _opening(closed: str | None, prompt: str, between: str, units: _Units) -> Form:
    """How an answer is opened, from the text that follows a question.

    Args:
      closed: where it is the last turn; None where the template refuses that.
      prompt: where an answer is asked for.
      between: where an answer stands.
    """
    silent = closed is not None and closed.startswith(prompt)  # add_generation_prompt opens nothing
    if silent:
        shared = own = prompt
    else:
        own = "" if closed is None else units.common(closed, prompt)
        shared = units.common(prompt, between)
    opening, lead = shared[len(own) :], between[len(shared) :]
    if not between.startswith(shared) or not shared.startswith(own) or not (silent or opening):
        asked, stands = prompt[-60:], between[-60:]
        return Form(problem=f"ends a prompt with {asked!r} but writes {stands!r} before the answer itself")
    if not silent or not lead.strip():
        return Form(opening, lead, prompt[len(shared) :])
    opening = lead.rstrip(" ")  # the space before a word is part of its token
    return Form(opening, lead[len(opening) :], added=opening)


def agree(*rows: Sequence[str]) -> int:
    """How many items the rows have in common at their beginning."""
    different = (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return next(different, min(map(len, rows)))


class _Units:
    """Texts as sequences of control tokens and characters."""

    def __init__(self, control: Collection[str]) -> None:
        names = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True)) or "(?!)"
        self._names, self._units = re.compile(names), re.compile(f"{names}|.", re.DOTALL)

    def common(self, *texts: str, end: bool = False) -> str:
        """What all texts begin with, or end with."""
        step = -1 if end else 1
        rows = [self._units.findall(text)[::step] for text in texts]
        return "".join(rows[0][: agree(*rows)][::step])

    def opened(self, none: list[str], closed: str, tail: str, middle: str) -> str:
        """What opens an answer after every rendering; `none` is that of no turn, the others as for `ends`."""
        opened = self.common(*none, closed, tail, end=True)
        both = list(self._names.finditer(self.common(tail, middle)))
        if len(both) > 1 and not self._names.search(tail.removesuffix(opened)):
            return tail[both[0].end() :]  # a system message that it adds by itself ends as an answer does
        return opened

    def ends(self, closed: str, tail: str, middle: str) -> tuple[str, ...]:
        """What ends an answer, up to and including the last control token that always follows it.

        Args:
          closed: the text after a question that is the last turn.
          tail: after an answer that is the last turn.
          middle: between an answer and the next question; it may be the latter's opening alone.
        """
        if always := list(self._names.finditer(self.common(tail, middle))):
            return (tail[: always[-1].end()],)
        asked, last, inner = (self._names.search(text) for text in (closed, tail, middle))
        if last is None:
            return ()
        known = {found[0] for found in (asked, last) if found}
        found = [middle[: inner.end()]] if inner and inner[0] in known else []
        return tuple(dict.fromkeys([*found, tail[: last.end()]]))
