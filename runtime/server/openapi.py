"""The OpenAPI document, from the types that bodies are decoded into."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from megalith.version import __version__

from .bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_ERRORS = {
    "400": "The request cannot be served as it is",
    "401": "No valid API key",
    "404": "No such model",
    "405": "The path takes another method",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The body is not declared as JSON",
    "429": "The queue is full",
    "500": "The engine failed",
    "503": "The engine is not ready",
    "504": "The request took too long",
}
_POSTS = {
    "/v1/completions": (CompletionBody, "Continue a prompt", True),
    "/v1/chat/completions": (ChatBody, "Answer messages", True),
    "/tokenize": (TokenizeBody, "Token ids of a text or of messages", False),
    "/detokenize": (DetokenizeBody, "Text of token ids", False),
}
_GETS = {
    "/v1/models": ("The model that is served", "application/json"),
    "/tokenizer_info": ("The tokenizer", "application/json"),
    "/health": ("Whether the server is alive", "application/json"),
    "/health/ready": ("Whether it takes requests; needs no key", "application/json"),
    "/ready": ("Whether it takes requests", "application/json"),
    "/metrics": ("Prometheus metrics", "text/plain"),
    "/version": ("The version", "application/json"),
    "/facts": ("Model, memory and load", "application/json"),
    "/openapi.json": ("This document", "application/json"),
    "/": ("A page to try the model", "text/html"),
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    bodies = [body for body, _, _ in _POSTS.values()]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for (path, (_, summary, streams)), schema in zip(_POSTS.items(), schemas, strict=True):
        paths[path] = {"post": _operation(summary, ["application/json", *(["text/event-stream"] if streams else [])], schema)}
    for path, (summary, kind) in _GETS.items():
        paths[path] = {"get": _operation(summary, [kind], None)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Megalith", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(summary: str, kinds: list[str], schema: Any) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": {kind: {} for kind in kinds}}}
    responses |= {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _error_schema() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "required": list(fields), "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}
