"""Options of `jaxgpt sample` and `chat`: what a completion may be, and what is put before a question.

Nothing here imports jax before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import Knowledge, code
from jaxgpt.data.knowledge import Found, Library, open_library
from jaxgpt.errors import require
from jaxgpt.files import read_json, read_text
from jaxgpt.sample.constrained import Rule, choices, grammar, json_schema, regex
from jaxgpt.sample.output import note


@dataclass(frozen=True, kw_only=True)
class Ruled:
    """What a completion may be; one of these at most."""

    choices: str = ""
    """Answers with commas between them, of which the completion is one."""
    regex: str = ""
    """Regular expression that the whole completion matches (no look-around or back-references)."""
    json_schema: str = ""
    """File with a JSON schema that the completion, a JSON value, keeps."""
    grammar: str = ""
    """File with a grammar in Lark's syntax that the completion follows from the rule `start` on."""

    def rule(self) -> Rule | None:
        """The rule; None where there is none.

        Raises:
          UserError: several, or one that cannot be followed.
        """
        given = {name: value for name, value in vars(self).items() if value}
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        require(len(given) < 2, f"{flags} are given; a completion keeps one rule, so drop the others.")
        if self.choices:
            return choices([text.strip() for text in self.choices.split(",")])
        if self.regex:
            return regex(self.regex)
        if self.json_schema:
            held: Any = read_json(Path(self.json_schema), dict[str, Any] | bool, "give a JSON schema")
            return json_schema(held)
        if self.grammar:
            return grammar(read_text(Path(self.grammar), "give a grammar"))
        return None


def library_of(knowledge: Knowledge, verify: bool) -> Library | None:
    """What is known, read; None where nothing is named. An encoder may be a run's folder.

    Raises:
      UserError: it cannot be read.
    """
    if not knowledge:
        return None
    if not knowledge.encoder or code.is_reference(knowledge.encoder):
        code.trust_named(knowledge)
        return open_library(knowledge)
    from jaxgpt.sample.encode import load_encoder

    return open_library(knowledge, load_encoder(knowledge.encoder, verify=verify))


def told(found: Found) -> dict[str, Any]:
    """What was put before a question, for JSON."""
    return {"sources": [*found.sources], "facts": [*found.facts]}


def tell(found: Found) -> None:
    """Name the sources of what was put before a question."""
    said = [*(f"fact: {fact}" for fact in found.facts), *(f"source: {one}" for one in found.sources)]
    for line in said or ["nothing is known about this, so nothing was put before it"]:
        note(line)
