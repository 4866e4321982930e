"""The app: OpenAI's addresses and a few more, on a service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxgpt import __version__
from jaxgpt.serve import published
from jaxgpt.serve.asking import Asker
from jaxgpt.serve.chat import chat
from jaxgpt.serve.completions import complete
from jaxgpt.serve.errors import Refused, error_body, invalid
from jaxgpt.serve.gate import Gate, State
from jaxgpt.serve.origins import let_in
from jaxgpt.serve.reading import Reader
from jaxgpt.serve.schemas import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    ScoreBody,
    TokenizeBody,
)
from jaxgpt.serve.service import Service
from jaxgpt.serve.session import check_model, model_names


def make_app(service: Service, state: State | None = None) -> FastAPI:
    """The app of a service; `app.state.run` is its `State`.

    Args:
      service: what answers.
      state: shared with what starts and ends it; None for one of its own.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.access.close()

    app = FastAPI(title="jaxgpt", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.run = state or State()
    app.state.service = service
    app.add_middleware(Gate, service=service, state=app.state.run)
    if service.origins:
        let_in(app, service.origins)  # around the gate, whose refusals pages may read too
    _add_errors(app, service)
    _add_answers(app, service)
    _add_state(app, service)
    for router in service.routers:
        app.include_router(router)
    published.publish(app)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    asker, reader, said = Asker(service), Reader(service), published.ANSWERS

    @app.post("/v1/chat/completions", responses=said["chat"], tags=["OpenAI"])
    async def chat_completions(http: Request, body: ChatBody) -> Response:
        return await chat(asker, http, body)

    @app.post("/v1/completions", responses=said["completion"], tags=["OpenAI"])
    async def completions(http: Request, body: CompletionBody) -> Response:
        return await complete(asker, http, body)

    @app.post("/v1/embeddings", responses=said["list"], tags=["OpenAI"])
    async def embeddings(http: Request, body: EmbeddingBody) -> Response:
        return await reader.embed(http, body)

    @app.post("/v1/classify", responses=said["list"], tags=["own"])
    async def classify(http: Request, body: ClassifyBody) -> Response:
        return await reader.classify(http, body)

    @app.post("/score", responses=said["list"], tags=["own"])
    async def score(http: Request, body: ScoreBody) -> Response:
        return await reader.score(http, body)

    @app.post("/tokenize", responses=said["tokens"], tags=["own"])
    async def tokenize(http: Request, body: TokenizeBody) -> Response:
        return await reader.tokenize(http, body)

    @app.get("/tokenizer_info", responses=said["tokenizer"], tags=["own"])
    async def tokenizer_info() -> dict[str, Any]:
        return reader.tokenizer_info()

    @app.post("/detokenize", responses=said["text"], tags=["own"])
    async def detokenize(http: Request, body: DetokenizeBody) -> Response:
        return await reader.detokenize(http, body)


def _add_state(app: FastAPI, service: Service) -> None:
    begun = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": begun, "owned_by": "jaxgpt"}

    @app.get("/v1/models", responses=published.ANSWERS["models"], tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in model_names(service)]}

    @app.get("/v1/models/{model}", responses=published.ANSWERS["model"], tags=["OpenAI"])
    async def model(model: str) -> dict[str, Any]:
        check_model(service, model)
        return card(model)

    @app.get("/health", responses=published.ANSWERS["state"], tags=["own"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses=published.ANSWERS["ready"], tags=["own"])
    async def ready() -> Response:
        run: State = app.state.run
        word = "draining" if run.draining else "ready"
        return JSONResponse({"status": word}, 200 if word == "ready" else 503)


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(refused: Refused) -> Response:
        body = error_body(refused.status, str(refused), refused.code, refused.param)
        return JSONResponse(body, refused.status, refused.headers)

    def watched(http: Request, refused: Refused) -> Response:
        for observer in service.observers:
            observer.refused(http.url.path, refused.status, http.state.request_id)
        return answer(refused)

    @app.exception_handler(Refused)
    async def refused(http: Request, error: Refused) -> Response:
        opened = getattr(http.state, "opened", False)
        return answer(error) if opened else watched(http, error)

    @app.exception_handler(RequestValidationError)
    async def unfit(http: Request, error: RequestValidationError) -> Response:
        return watched(http, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> Response:
        path = http.url.path
        message = {
            400: "the body is not JSON in UTF-8; send one JSON object.",
            404: f"there is no address {path!r:.200}; see /openapi.json.",
            405: f"{path!r:.200} takes no {http.method}; see /openapi.json.",
        }.get(error.status_code, f"{error.detail}.")
        return watched(http, Refused(error.status_code, message, headers=error.headers))
