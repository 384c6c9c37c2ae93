"""The OpenAPI 3.1 document, made from the table of operations and their models."""

import inspect
from functools import cache
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from dispatcher.web.api.models import base
from dispatcher.web.api.operation import PATH_TYPES, PREFIX, Operation
from dispatcher.web.problems import CONTENT_TYPE
from dispatcher.web.visit import BODY_BYTES_MAX, SAFE, Who

_REF = "#/components/schemas/{model}"

DESCRIPTION = """\
Send `Authorization: Bearer whkey_…`. An operator's key may do everything; an account's sees and touches what is its own, \
and what is another's isn't there for it (404). In a browser that is logged in, requests carry its cookie, and changes the \
header `X-CSRF-Token`.

Lists come in pages: go on with `?cursor=` and the answer's `next`. Errors are `application/problem+json` with a `code` for \
programs, a `detail` for people and the `field` to blame. Times are RFC 3339."""


@cache
def parts(operations: tuple[Operation, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return paths and schemas."""
    used = _models(operations)
    by_model, definitions = models_json_schema(list(used), ref_template=_REF)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, by_model)
    return paths, definitions.get("$defs", {})


def document(operations: tuple[Operation, ...], *, title: str, server: str) -> dict[str, Any]:
    paths, schemas = parts(operations)
    tags = dict.fromkeys(operation.tag for operation in operations)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{title} API", "version": "1", "description": DESCRIPTION},
        "servers": [{"url": server + PREFIX}],
        "security": [{"key": []}, {"login": []}],
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "login": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-CSRF-Token",
                    "description": "Beside a login's cookie.",
                },
            },
        },
    }


def _models(operations: tuple[Operation, ...]) -> list[tuple[type[BaseModel], Any]]:
    used: dict[tuple[type[BaseModel], Any], None] = {(base.ProblemAnswer, "serialization"): None}
    for operation in operations:
        used[operation.answer, "serialization"] = None
        if operation.body is not None:
            used[operation.body, "validation"] = None
    return list(used)


def _operation(operation: Operation, by_model: Any) -> dict[str, Any]:
    summary, _, description = inspect.cleandoc(operation.handler.__doc__ or "").partition("\n")
    answer = {"application/json": {"schema": by_model[operation.answer, "serialization"]}}
    statuses = {operation.status: HTTPStatus(operation.status).phrase}
    if operation.method == "PUT":
        statuses[201] = "Created"
    if operation.status == 202:
        statuses[200] = "Done"
    responses: dict[str, Any] = {
        str(status): {"description": phrase, "content": answer} for status, phrase in sorted(statuses.items())
    }
    problem = {CONTENT_TYPE: {"schema": by_model[base.ProblemAnswer, "serialization"]}}
    for status in _errors(operation):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": problem}
    shown: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": summary,
        "parameters": _parameters(operation),
        "responses": responses,
    }
    text = " ".join(description.split())
    if operation.who is Who.OPERATOR:
        text = f"{text} For operators.".strip()
    if text:
        shown["description"] = text
    if operation.body is not None:
        shown["requestBody"] = {
            "required": not operation.body_is_optional,
            "content": {"application/json": {"schema": by_model[operation.body, "validation"]}},
        }
        if operation.body_bytes_max != BODY_BYTES_MAX:
            shown["requestBody"]["description"] = f"At most {operation.body_bytes_max} bytes."
    return shown


def _errors(operation: Operation) -> list[int]:
    errors = {400, 401, 403, 429, 503}
    if operation.parameters or operation.query is not None:
        errors.add(404)
    if operation.method not in SAFE:
        errors |= {404, 408, 409, 413, 415}
    return sorted(errors)


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found = [
        {"name": name, "in": "path", "required": True, "schema": TypeAdapter(PATH_TYPES[name]).json_schema()}
        for name in operation.parameters
    ]
    if operation.query is not None:
        schema = operation.query.model_json_schema(ref_template=_REF)
        required = schema.get("required", [])
        for name, given in schema["properties"].items():
            shown = {"name": name, "in": "query", "required": name in required, "schema": _not_null(given)}
            if "description" in given:
                shown["description"] = shown["schema"].pop("description")
            found.append(shown)
    if operation.is_idempotent:
        found.append(
            {
                "name": "Idempotency-Key", "in": "header", "required": False,
                "description": "Repeat the request under the same key, and it is done once; for 24 hours.",
                "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
            }
        )  # fmt: skip
    return found


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query's parameter is left out, never null."""
    kept = {
        key: value
        for key, value in schema.items()
        if key not in ("default", "title") or (key == "default" and value is not None)
    }
    if "anyOf" in kept:
        [only] = [one for one in kept.pop("anyOf") if one.get("type") != "null"]
        kept |= only
    return kept
