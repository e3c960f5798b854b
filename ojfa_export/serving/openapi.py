"""What the server understands, as an OpenAPI document."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from ojfa_export._version import __version__
from ojfa_export.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len", "ojfa"],
    "properties": {
        "id": {"type": "string", "description": "What `model` of a request names."},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer", "description": "Tokens of the longest sequence."},
        "ojfa": {
            "type": "object",
            "required": ["blocks", "exit", "exits", "auto", "drafts", "chat", "promise"],
            "properties": {
                "blocks": {"type": "integer", "description": "Full depth."},
                "family": {"type": "string"},
                "precision": {"type": "string"},
                "exit": {
                    "type": ["integer", "string"],
                    "description": "Blocks to run where a request doesn't say.",
                },
                "exits": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "description": "Those before full depth that there are.",
                },
                "auto": {"type": "boolean", "description": "Whether it has a policy."},
                "drafts": {"type": "boolean", "description": "Whether it has a draft layer."},
                "chat": {"type": "boolean", "description": "Whether it has a chat template."},
                "promise": {"anyOf": [{"type": "null"}, {"$ref": "#/components/schemas/Promise"}]},
            },
        },
    },
}
_PROMISE = {
    "type": "object",
    "required": ["max_disagreement", "confidence", "relative_cost", "reason", "domains"],
    "description": "What is promised of the exit `auto`.",
    "properties": {
        "max_disagreement": {
            "type": "number",
            "description": "The largest share of tokens that differ from full depth's.",
        },
        "confidence": {"type": "number", "description": "Of the statement."},
        "relative_cost": {"type": "number", "description": "Of a token; full depth is 1."},
        "reason": {"type": "string"},
        "domains": {"type": "array", "items": {"type": "string"}},
    },
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}
_REFUSALS = {
    "400": "A field is wrong; `param` names it.",
    "401": "No key, or a wrong one.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "The queue is full; `Retry-After` says when to try again.",
    "503": "The server loads, or ends.",
    "504": "No token came within the timeout.",
}
_GENERATES = ("200", "400", "401", "404", "413", "429", "503", "504")


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The document."""
    schemas: dict[str, Any] = {
        "Error": _ERROR,
        "Model": _MODEL,
        "Models": _MODELS,
        "Promise": _PROMISE,
    }
    bodies: dict[str, type[BaseModel]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/tokenize": TokenizeRequest,
    }
    paths: dict[str, Any] = {}
    for path, body in bodies.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        streams = path.startswith("/v1")
        paths[path] = {"post": _operation(body.__name__, streams=streams)}
    for path in ("/v1/models", "/version", "/health", "/openapi.json"):
        statuses = {"/v1/models": ("200", "401", "503"), "/health": ("200", "503")}
        answers = _answers(statuses.get(path, ("200",)))
        if path == "/health":
            answers["503"] = _json({"type": "object"}, "The server loads, or ends.")
        if path == "/v1/models":
            answers["200"] = _json({"$ref": "#/components/schemas/Models"}, "The bundles.")
        paths[path] = {"get": {"operationId": path.strip("/").replace("/", "_"),
                               "responses": answers}}  # fmt: skip
    page = {"description": "A page for people.", "content": {"text/html": {}}}
    paths["/"] = {"get": {"operationId": "page", "responses": {"200": page}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ojfa-export", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(body: str, *, streams: bool) -> dict[str, Any]:
    answers = _answers(_GENERATES if streams else ("200", "400", "401", "404", "413", "503"))
    if streams:
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    reference = {"$ref": f"#/components/schemas/{body}"}
    return {
        "operationId": body,
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": answers,
    }


def _answers(statuses: tuple[str, ...]) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    return {
        status: _json({"type": "object"}, "The answer.")
        if status == "200"
        else _json(error, _REFUSALS[status])
        for status in statuses
    }


def _json(schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}
