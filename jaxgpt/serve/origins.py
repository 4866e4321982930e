"""Which web pages may ask a service from a browser (CORS); none but its own unless they are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxgpt.errors import require

if TYPE_CHECKING:
    from fastapi import FastAPI

ANY = "*"
_PORTS = {"http": 80, "https": 443}
_SHOWN = (
    *("x-request-id", "retry-after", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"),
    *("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens"),
)
"""Headers of answers that pages may read."""


def check_origins(origins: Sequence[str], keyed: bool) -> None:
    """Refuse what no browser would send as an origin.

    Args:
      origins: as browsers write them, such as `https://a.example`, or `*` for all pages.
      keyed: whether who asks needs a key.

    Raises:
      UserError: one is no origin, or all pages might ask without a key.
    """
    for origin in origins:
        require(
            keyed or origin != ANY,
            "--origins is *, so any web page could ask, but there are no keys; add --keys FILE, or name the "
            "pages' origins.",
        )
        require(
            origin == ANY or _is_origin(origin),
            f"--origins has {origin!r:.100}; write an origin as browsers do, in lower case, with nothing "
            "after the host but a port that is not the scheme's own, such as https://a.example.",
        )


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # of a port, or of brackets
        return False
    if not host or not text.isascii() or text != f"{parts.scheme}://{parts.netloc}":
        return False
    own = f"[{host}]" if ":" in host else host
    ported = own if port is None else f"{own}:{port}"
    return parts.netloc == ported and port != _PORTS.get(parts.scheme, 0) and "*" not in host


def let_in(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer preflight requests of pages of these origins, and let them read answers.

    Cookies play no part: a key is sent by the page itself. What a page asks passes all else as any request.
    """
    from starlette.middleware.cors import CORSMiddleware

    app.add_middleware(
        CORSMiddleware,
        allow_origins=[*origins],
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's own client sends several
        expose_headers=[*_SHOWN],
    )
