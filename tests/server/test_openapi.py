"""Random requests over the OpenAPI document find no 5xx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from serving import ServerProcess, until

EXAMPLES = 60  # of each operation, of valid and of invalid data


@pytest.fixture(scope="module")
def echo(model: Path) -> Any:
    """Short contexts and many places, so that random requests meet neither time nor queue limits."""
    options = ("--backend", "echo", "--max-seq-len", "256", "--max-sequences", "256", "--max-queue", "4096")
    with ServerProcess(model, *options, "--max-batch-tokens", "4096") as running:
        yield running


def examine(operation: Any, mode: Any, count: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @given(data=st.data())
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=quiet, phases=[Phase.generate], derandomize=True
    )
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.validate_response(case.call(), checks=[not_a_server_error, status_code_conformance])

    check()


@pytest.mark.parametrize(
    "mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE], ids=["valid", "invalid"]
)
def test_no_5xx(echo: ServerProcess, mode: Any) -> None:
    document = echo.json("GET", "/openapi.json")
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=echo.url)
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue

        examine(operation, mode, EXAMPLES if operation.method.upper() == "POST" else 3)
    until(echo.is_idle, 30)
    assert echo.event("internal_error") is None
    assert echo.json("GET", "/ready")["status"] == "ready"


def test_the_document_names_every_route(echo: ServerProcess) -> None:
    from megalith.runtime.server.app import ROUTES

    document = echo.json("GET", "/openapi.json")
    assert set(document["paths"]) == set(ROUTES)
    for path, route in ROUTES.items():
        assert set(document["paths"][path]) == {route.method.lower()}
