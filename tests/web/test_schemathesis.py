"""The published document against the real server: whatever fits it, or doesn't, gets an answer that it promises, and never a 5xx."""

import asyncio
import itertools
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.web.conftest import Site
from tests.web.test_table import their_things

EXAMPLES = 15  # an operation; all of them together take half a minute
CHECKED = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# 503 is promised: it is what a busy database says. Nothing here makes it busy.


@pytest.mark.parametrize("whose", ["operator", "account"])
async def test_every_answer_is_as_published(web: Site, whose: str):
    things = await their_things(web)
    key = await web.key(None if whose == "operator" else "theirs")
    document = (await web.ask("GET", "/api/v1/openapi.json")).json
    failures = await asyncio.to_thread(_explore, document, web.url, key, things)
    assert failures == []


def _explore(document: dict[str, Any], url: str, key: str, things: dict[str, Any]) -> list[str]:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url + "/api/v1")
    failures: list[str] = []
    numbers = itertools.count()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in ("/endpoints/{endpoint_id}/test",):
            continue  # POSTs to what the examples name; tests/web/test_api.py has it on a receiver of its own

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def explore(case: Any) -> None:
            if next(numbers) % 3 == 0:  # else only what isn't there would be asked for
                case.path_parameters = {name: things.get(name, value) for name, value in case.path_parameters.items()}
            response = case.call(headers={"Authorization": f"Bearer {key}"}, timeout=10)
            assert response.status_code != 503, response.text
            case.validate_response(response, checks=CHECKED)

        strategy = operation.as_strategy()

        try:
            given(case=strategy)(explore)()
        except Exception as exc:
            failures.append(f"{operation.method.upper()} {operation.path}: {exc}")
    return failures
