"""The chat page at `/`: plain files of this package, and what a browser may do with them.

The page holds no secret and asks the server nothing but what its public interface answers, so it is served
without a key; what it asks carries the key that its user enters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "web"
PUBLIC = ("/", "/page/")
"""What needs no key: the page's path, and what its files' paths begin with."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""No code or style but the page's own files runs, no text becomes markup, nothing goes to other servers, and
no other page can frame this one. `no-cache` lets a browser keep the files and ask whether they changed."""


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def page_router() -> APIRouter:
    """The page at `/` and its files under `/page/`."""
    router, files = APIRouter(include_in_schema=False), _Files(directory=FOLDER)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        return await files.get_response(name, request.scope)

    return router
