"""What a service refuses: one sentence, a status, and the names by which OpenAI's clients know it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.errors import UserError

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
