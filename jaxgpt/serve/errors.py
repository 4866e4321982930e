"""What a service refuses: one sentence, a status, and the names by which OpenAI's clients know it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.errors import NotFinite, UserError, shown
from jaxgpt.sample.request import Full

SAID = "said"
"""Type of pydantic's errors whose message is ours."""
log = logging.getLogger(__name__)

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's type of an error by its status; others below 500 are the request's, the rest the server's."""


class Refused(UserError):
    """A request that gets no answer.

    Args:
      status: of HTTP, 400 to 599.
      message: one sentence: what was wrong, and the fix.
      code: what programs know it by, such as `model_not_found`.
      param: the field of the request that is wrong; None where it is none.
      retry_after: seconds after which the same request may pass; None where it is of no use to wait.
      headers: sent beside the error, such as what is left of a limit.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        waits = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        self.headers = {**(headers or {}), **waits}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Any:
    """An error as OpenAI writes it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: BaseException, where: str) -> Refused:
    """What a client is told of an error; one that is the server's own fault is logged with its traceback.

    Args:
      error: of any class.
      where: the request, for the log.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(429, str(error), code="queue_full", retry_after=1)
    if isinstance(error, NotFinite):
        log.error("%s: %s", where, error)
        return Refused(500, str(error), code="not_finite")
    if isinstance(error, UserError):
        return Refused(400, str(error))
    log.error("%s failed", where, exc_info=error)
    return Refused(
        500, f"the server failed at this request; its log says why ({where}).", code="internal_error"
    )


def invalid(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """What a client is told of a body that does not fit its schema, from pydantic's list of errors."""
    deepest = max(errors, key=lambda error: (len(error["loc"]), error["type"] == SAID))
    if any(error["type"] in ("json_invalid", "json_type") for error in errors):
        return Refused(400, "the body is not JSON; send one JSON object.", code="not_json")
    if deepest["type"] in ("model_attributes_type", "model_type") and len(deepest["loc"]) == 1:
        if isinstance(deepest.get("input"), bytes):
            message = "the body is not taken as JSON; send the header Content-Type: application/json."
            return Refused(400, message, code="not_json")
        return Refused(400, f"the body is {shown(deepest.get('input'))}; send one JSON object.")
    path = [str(part) for part in deepest["loc"][1:] if not _names_a_type(part)]
    param, why = ".".join(path), str(deepest["msg"])
    if deepest["type"] == SAID:  # in words of our own
        field = ".".join([*path, deepest["ctx"]["field"]])
        end = "" if why.endswith("?") else "."
        return Refused(400, f"{param}: {why}{end}" if param else f"{why}{end}", param=field[:200])
    if deepest["type"] == "missing":
        return Refused(400, f"{param or 'the body'} is missing; give it.", param=param or None)
    must = re.sub(r"^\w+ should", "it must", why.partition(" after validation")[0])
    return Refused(
        400, f"{param or 'the body'} is {shown(deepest.get('input'))}; {must}.", param=param or None
    )


def _names_a_type(part: str | int) -> bool:
    """Whether a part of pydantic's path is no field but a member of a union, such as `list[str]`."""
    return isinstance(part, str) and (part in _TYPES or not (part.isidentifier() or part.isdigit()))


_TYPES = ("str", "int", "float", "bool", "Chosen", "constrained-str")
