"""Requests made from /openapi.json itself: whatever comes, the answer is one that is described there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.acceptance.conftest import served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS, ABSENT = "/v1/kimi/events", "/v1/embeddings"  # a stream without end, and 501 by design


@pytest.fixture(scope="module")
def api(instant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The description of a server with so small a context that every answer ends soon."""
    with served(instant, tmp_path_factory.mktemp("state"), "--ctx", "96") as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path=[ENDLESS, ABSENT])


def failure(operation: Any, mode: GenerationMode) -> str:
    """The smallest request that was answered in another way than is described; empty if there was none."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    try:
        ask()
    except Exception as error:  # told with those of the other operations
        return f"{operation.label}: {error}"
    return ""


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described(api: Any, mode: GenerationMode) -> None:
    """For requests as they are described, and for bodies that are not."""
    operations = [found.ok() for found in api.get_all_operations()]
    asked = [each for each in operations if mode is GenerationMode.POSITIVE or each.method == "post"]
    assert len(asked) >= 8
    told = [text for text in (failure(operation, mode) for operation in asked) if text]
    assert not told, "\n\n".join(told)
