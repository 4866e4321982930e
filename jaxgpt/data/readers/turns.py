"""Turns of dialogues as files have them: names of roles, what each field means, and which are refused.

Every field is read, or known to say nothing about what is learned (`METADATA`), or returned, so that its
name can be told; one that would change what is learned and cannot be honoured is refused by name.
"""

from __future__ import annotations

import json
import re
from typing import Any, NotRequired, TypedDict

from jaxgpt.data.lines import check_text, kind_name
from jaxgpt.errors import nearest
from jaxgpt.files import check_json
from jaxgpt.text.chat import Dialogue

Record = dict[str, Any]

_ROLES = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bot chatbot model ai bing bard claude",
    "tool": "tool function observation ipython tool_response tool_result function_response",
    "call": "function_call tool_call",
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names.split()}
_ROLE_KEYS, _TEXT_KEYS, _CALLS = ("role", "from"), ("content", "value"), ("tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_FLAGS = {  # of a turn -> whether a true one says that the turn is trained
    "weight": True, "train": True, "trainable": True, "training": True, "loss": True, "loss_weight": True,
    "loss_mask": True, "mask": False, "masked": False,
}  # fmt: skip
PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag")
"""Fields of what preference tuning learns from."""
_REFUSED = (
    *("audio", "audios", "documents", "functions", "image", "images", "tools", "video", "videos"),
    *("loss_weights", "train_detail", "training_detail", "weights"),
)
_NOTHING = (None, "", [], {}, "[]", "{}")
METADATA = frozenset(
    re.findall(
        r"\w+",
        """
        __index_level_0__ _id annotator author category categories conversation_id create_time
        created created_at dataset date dialogue_id difficulty domain extra_info generator guid hash
        id idx index is_impossible lang lang_code language length level licence license link
        message_id meta metadata model model_name num_tokens num_turns origin parent_id prompt_id
        quality_score question_id rank rating reward score scores session_id source sources split
        subject subset tag tags task task_type time timestamp title token_count tokens topic turn
        turn_id type uid updated_at url uuid version worker_id
        """,
    )
)
"""Fields that say where a record is from, or how good it is, and nothing about what is learned."""


class _Function(TypedDict):
    name: str
    arguments: NotRequired[Any]


class _Call(TypedDict):
    function: _Function
    id: NotRequired[str | None]
    type: NotRequired[str | None]


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, by the first of them."""
    first = value[0] if isinstance(value, list) and value else None
    return (
        isinstance(first, dict)
        and any(k in first for k in _ROLE_KEYS)
        and any(k in first for k in (*_TEXT_KEYS, *_CALLS))
    )


def read_turns(value: Any, unread: list[str], name: str) -> Dialogue:
    """The turns of a field's value, roles by their usual names; adds to the names of fields unread.

    Raises:
      ValueError: it is no list of turns, with a short reason.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"a non-empty list of turns was expected in {name!r}, not {kind_name(value)}")
    return [_turn(turn, unread) for turn in value]


def take_text(record: Record, name: str) -> str:
    """Takes a field's text out of a record; where it is null or missing, an empty one."""
    value = record.pop(name, None)
    return "" if value is None else check_text(value, name)


def left_over(rest: Record, prefix: str = "", named: bool = False) -> list[str]:
    """The names of fields that nobody read, for a warning.

    Args:
      rest: the record less what was read.
      prefix: says whose they are.
      named: whether the config names the fields to read; those of preferences may then be left unread.

    Raises:
      ValueError: on a field that would change what is learned.
    """
    held = {name: value for name, value in rest.items() if value not in _NOTHING}
    for name, value in held.items():
        if not named and (name in PREFERENCES or (name == "label" and isinstance(value, bool))):
            raise ValueError(
                f"field {name!r} is for preference tuning, which Pairs and Rated data do; name the fields to "
                "learn from with data.prompt and data.completion, or use those"
            )
        if name in _REFUSED or (name in _FLAGS and value not in (1, True)):
            raise ValueError(f"{prefix}field {name!r} would change what is learned, and is not supported")
    return [f"{prefix}field {name!r}" for name in held if name not in METADATA and name not in _FLAGS]


# ---------------------------------------------------------------------------------------- one turn


def _turn(value: Any, unread: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a turn is {kind_name(value)}, not an object")
    turn = dict(value)
    calls = [call for name in _CALLS for call in _calls(turn.pop(name, None), name)]
    role_key = next((k for k in _ROLE_KEYS if k in turn), None)
    text_key = next((k for k in _TEXT_KEYS if k in turn), "content" if calls else None)
    if role_key is None or text_key is None:
        raise ValueError("a turn needs 'role' and 'content', or 'from' and 'value'")
    said = check_text(turn.pop(role_key), role_key)
    role, content = _ROLE.get(said.strip().lower().replace("-", "_")), turn.pop(text_key, None)
    if role is None:
        raise ValueError(f"role {said!r} is unknown{nearest(said.lower(), _ROLE)}")
    if role == "call":
        role, content, calls = "assistant", None, [*calls, *_spelled(content, text_key)]
    if calls and role != "assistant":
        raise ValueError(f"a turn of {said!r} calls tools; only the assistant's do")
    if content is None and not calls:
        raise ValueError(f"field {text_key!r} is null, and the turn calls no tool")
    made: dict[str, Any] = {"role": role, "content": "" if content is None else _content(content, text_key)}
    if calls:
        made["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if text := take_text(turn, name):
            made[name] = text
    thoughts = list(dict.fromkeys(text for name in _THOUGHTS if (text := take_text(turn, name))))
    if len(thoughts) > 1:
        raise ValueError(f"a turn has two different texts in {', '.join(_THOUGHTS)}")
    if thoughts:
        made["reasoning_content"] = thoughts[0]
    learn = _flag(turn)
    if learn and role != "assistant":
        raise ValueError(f"a turn of {said!r} is marked to be trained; only the assistant's are")
    if learn is False and role == "assistant":
        made["learn"] = False
    unread += left_over(turn, "a turn's ")
    return made


def _content(value: Any, name: str) -> str:
    """A turn's text: a string, or a list of parts that are text, which are joined."""
    if not isinstance(value, list):
        return check_text(value, name)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"field {name!r} has a part of type {kind!r}; only text is learned")
        texts.append(check_text(part.get("text") if isinstance(part, dict) else part, name))
    return "".join(texts)


def _calls(value: Any, name: str) -> list[Any]:
    """Calls of tools as OpenAI writes them; a function by itself is taken for a call of it."""
    calls = value if isinstance(value, list) else [value] if value else []
    whole = [{"type": "function", "function": c} if isinstance(c, dict) and "name" in c else c for c in calls]
    check_json(
        whole, list[_Call], f"field {name!r}", 'a call is {"function": {"name": ..., "arguments": ...}}'
    )
    return whole


def _spelled(content: Any, name: str) -> list[Any]:
    """The calls that the text of a `function_call` turn spells in JSON."""
    try:
        return _calls(json.loads(check_text(content, name)), name)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"field {name!r} of a turn that calls a tool is not JSON") from None


def _flag(turn: Record) -> bool | None:
    """Takes out what a turn says about being trained: yes, no, or nothing."""
    said: set[bool] = set()
    for name, trained in _FLAGS.items():
        value = turn.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"field {name!r} of a turn is {value!r:.40}; a turn is trained (1) or not (0)")
        said.add(bool(value) == trained)
    if len(said) > 1:
        raise ValueError("the fields of a turn disagree on whether it is trained")
    return said.pop() if said else None
