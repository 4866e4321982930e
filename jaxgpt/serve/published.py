"""The published schema (`/openapi.json`): what answers and errors look like.

Bodies are answered as they are made, not checked against these on their way: tests do that.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_TEXT, _COUNT, _ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {}


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields]}


def _list(kind: Any) -> dict[str, Any]:
    return {"type": "array", "items": kind}


def _maybe(kind: Any) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_maybe(_TEXT), code=_maybe(_TEXT)))
"""Of every error."""
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_HEAD = {"id": _TEXT, "object": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_MESSAGE = _object(role=_TEXT, content=_maybe(_TEXT))
_MODEL = _object(id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT)
_STATUS = _object(status=_TEXT)
_STATUSES = {
    400: "The request is wrong.",
    401: "The key is missing or unknown.",
    403: "The key may not do this.",
    404: "There is no such model or address.",
    405: "The address takes no such method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "Too many requests or tokens; see Retry-After.",
    500: "The server failed.",
    503: "The server is ending, or not ready.",
    504: "The answer took too long.",
}


def _answers(schema: dict[str, Any], stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an address may answer."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": _TEXT}
    errors = {
        status: {"description": words, "content": {"application/json": {"schema": ERROR}}}
        for status, words in _STATUSES.items()
    }
    return {200: {"description": "The answer.", "content": content}, **errors}


def _choice(**fields: Any) -> dict[str, Any]:
    return _object(index=_COUNT, logprobs=_ANY, finish_reason=_TEXT, **fields)


ANSWERS = {
    "chat": _answers(_object(**_HEAD, choices=_list(_choice(message=_MESSAGE)), usage=_USAGE), stream=True),
    "completion": _answers(_object(**_HEAD, choices=_list(_choice(text=_TEXT)), usage=_USAGE), stream=True),
    "list": _answers(_object(object=_TEXT, model=_TEXT, data=_list(_object(index=_COUNT)))),
    "tokens": _answers(_object(tokens=_list(_COUNT), count=_COUNT, max_model_len=_COUNT)),
    "text": _answers(_object(prompt=_TEXT)),
    "tokenizer": _answers(_object(tokenizer_class=_TEXT, bos_token=_TEXT, eos_token=_TEXT)),
    "models": _answers(_object(object=_TEXT, data=_list(_MODEL))),
    "model": _answers(_MODEL),
    "state": _answers(_STATUS),
    "ready": _answers(_STATUS)
    | {503: {"description": "Not ready.", "content": {"application/json": {"schema": _STATUS}}}},
}
"""Statuses and bodies, by what is answered."""


def publish(app: FastAPI) -> None:
    """Drop from the schema the 422 that FastAPI adds: bodies that do not fit are answered with 400."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
