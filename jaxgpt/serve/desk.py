"""How a service answers where its documents say nothing, or a person is asked for. Without jax."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt.config.check import check_types
from jaxgpt.errors import UserError
from jaxgpt.files import to_json
from jaxgpt.serve.hook import run_hook
from jaxgpt.text.retrieve import IS_CJK

UNKNOWN = {
    "en": "I do not find an answer to this in the documents that I have. Ask for a person if you would like "
    "one to look into it.",
    "zh": "我手头的资料里没有这个问题的答案。如需人工处理，请说“转人工”。",
}
HANDOVER = {
    "en": "I am handing this conversation over to a person, who will answer you here.",
    "zh": "正在为您转接人工客服，请稍候。",
}
ASKS_PERSON = (
    r"\b(talk|speak|chat|connect(ed)?|transfer(red)?|put) (me )?(through )?(to|with) "
    r"(a|an|the|some|your)? ?(real |live |actual )?(person|human|agent|someone|somebody|representative|"
    r"operator|staff|employee|supervisor|manager)\b"
    r"|\b(real|live|actual) (person|human|agent)\b|\b(want|need|get me|give me) (a |an )?(human|person|agent|"
    r"operator|representative)\b|转人工|人工(客服|服务)|找(个)?(真人|人工)|(真人|人工)(来)?(回答|处理|接听)"
)
"""What asks for a person, in English and Chinese."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Of a service with documents."""

    beyond: Literal["unknown", "model"] = "unknown"
    """Who answers where the documents say nothing: a reply that it is not known, or the model by itself."""
    unknown_reply: str = ""
    """That reply; empty for one in English or Chinese, as the question is."""
    handover: str = ASKS_PERSON
    """Regular expression of what asks for a person; empty hands nothing over."""
    handover_reply: str = ""
    """What is then said; empty for one in English or Chinese."""
    handover_hook: str = ""
    """Command that is run then, with the conversation as JSON on its standard input."""

    def __post_init__(self) -> None:
        check_types(self, "")
        try:
            re.compile(self.handover)
        except re.error as error:
            raise UserError(
                f"--handover is {self.handover!r:.100}, no regular expression ({error}); mend it."
            ) from None

    def asks_person(self, text: str) -> bool:
        """Whether a turn asks for a person."""
        return bool(self.handover) and re.search(self.handover, text, re.IGNORECASE) is not None

    def say_unknown(self, question: str) -> str:
        """The reply where nothing is known."""
        return self.unknown_reply or UNKNOWN[_language(question)]

    def say_handover(self, question: str) -> str:
        """The reply where a person is asked for."""
        return self.handover_reply or HANDOVER[_language(question)]

    def hand_over(self, conversation: dict[str, Any]) -> bool:
        """Run the hook; whether it took the conversation."""
        return not self.handover_hook or run_hook(self.handover_hook, to_json(conversation))


DESK = Desk()


def _language(text: str) -> str:
    return "zh" if IS_CJK.search(text) else "en"
