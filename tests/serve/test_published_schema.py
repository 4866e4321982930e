"""The published schema (`/openapi.json`) against the server, by schemathesis: no request makes it fail."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_serving import tiny_model

from jaxgpt.sample.engine import Engine
from jaxgpt.serve.app import make_app
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.service import Service

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
BOUNDED = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def schema(engine: Engine) -> Any:
    few = Limits(answer_tokens=3, choices=4)
    app = make_app(Service(name="tiny", model=tiny_model(), engine=engine, limits=few))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_the_schema_says_what_is_asked(schema: Any) -> None:
    paths = {operation.ok().path for operation in schema.get_all_operations()}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/ready"} <= paths
    text = str(schema.raw_schema)
    assert "422" not in text
    assert "repetition_penalty" in text


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_the_server_fail_or_answer_otherwise(schema: Any, mode: GenerationMode) -> None:
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue

        @BOUNDED
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                case.body = body | {"model": "tiny"}  # else all that is tried is that others are refused
            case.call_and_validate(checks=CHECKS)

        ask()
