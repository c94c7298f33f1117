"""The description of the HTTP routes (OpenAPI 3.1), made from the contract's descriptors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field

_REFERENCE = "#/components/schemas/"
_SCALARS: dict[int, dict[str, Any]] = {
    Field.TYPE_BOOL: {"type": "boolean"},
    Field.TYPE_STRING: {"type": "string"},
    Field.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    Field.TYPE_DOUBLE: {"type": "number", "format": "double"},
    Field.TYPE_FLOAT: {"type": "number", "format": "float"},
    Field.TYPE_INT32: {"type": "integer", "format": "int32"},
    Field.TYPE_UINT32: {"type": "integer", "minimum": 0},
    # Proto3's JSON writes them as strings, since JavaScript's numbers do not hold them.
    Field.TYPE_INT64: {"type": "string", "pattern": "^-?[0-9]+$"},
    Field.TYPE_UINT64: {"type": "string", "pattern": "^[0-9]+$"},
}
# Messages whose JSON is not an object of their fields.
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "additionalProperties": True,
    },
}
_CONNECT_ERROR = {
    "type": "object",
    "required": ["code"],
    "properties": {
        "code": {"type": "string", "description": "The gRPC status in lower case, as `invalid_argument`."},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "description": "google.rpc.ErrorInfo with the reason; BadRequest and RetryInfo where they apply.",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "value": {"type": "string", "contentEncoding": "base64"},
                },
            },
        },
    },
}
_OPENAI_ERROR = {
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
                "code": {
                    "type": ["string", "null"],
                    "description": "The reason, as gRPC's ErrorInfo has it.",
                },
            },
        }
    },
}
_INPUT = {
    "oneOf": [
        {"type": "string", "description": "A text, or an image as a data URI."},
        {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
        {
            "type": "object",
            "required": ["image"],
            "properties": {"image": {"type": "string", "description": "A data URI, or base64 alone."}},
        },
    ]
}
_MODEL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
_MODEL_FIELD = {
    "type": "string",
    "description": "Name or id of the bundle; the server's first where it is missing.",
}


def description(services: Sequence[Any]) -> dict[str, Any]:
    """Return the OpenAPI description of every route.

    Parameters
    ----------
    services
        Descriptors of the services whose calls are routes.
    """
    schemas: dict[str, Any] = {"ConnectError": _CONNECT_ERROR, "OpenAIError": _OPENAI_ERROR}
    paths: dict[str, Any] = {}
    for service in services:
        for method in service.methods:
            if not (method.client_streaming and method.server_streaming):
                paths[f"/{service.full_name}/{method.name}"] = {"post": _call(service, method, schemas)}
    steering = services[0].file.pool.FindMessageTypeByName("monofacet.v1.Steering")
    _message(steering, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Monofacet",
            "version": version("monofacet-server"),
            "description": "Each call of the contract by the Connect protocol, and OpenAI's routes.",
        },
        "paths": paths | _openai_paths() | _health_paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # With a token where the server has some, else without.
        "security": [{"token": []}, {}],
    }


def _call(service: Any, method: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the operation of one call."""
    streams = method.client_streaming or method.server_streaming
    kind = "application/connect+json" if streams else "application/json"
    said = ""
    if streams:
        sides = "Requests are" if method.client_streaming else "Answers are"
        said = (
            f"{sides} a stream. Both bodies are envelopes of the Connect protocol: a byte of flags, the length in four "
            "bytes, and the JSON; the last of the answer has flag 2."
        )
    operation = {
        "operationId": f"{service.name}_{method.name}",
        "tags": [service.name],
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _message(method.input_type, schemas)}},
        },
        "responses": _responses(kind, _message(method.output_type, schemas), "ConnectError"),
        "parameters": [
            {
                "name": "Connect-Timeout-Ms",
                "in": "header",
                "schema": {"type": "integer"},
                "description": "Milliseconds that the call may take.",
            }
        ],
    }
    return operation | ({"description": said} if said else {})


def _responses(kind: str, schema: dict[str, Any], error: str) -> dict[str, Any]:
    return {
        "200": {"description": "The answer.", "content": {kind: {"schema": schema}}},
        "default": {
            "description": "What went wrong.",
            "content": {"application/json": {"schema": {"$ref": _REFERENCE + error}}},
        },
    }


def _message(descriptor: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return a reference to a message's schema, which is added to `schemas`."""
    name = descriptor.full_name
    if name in _WELL_KNOWN:
        return _WELL_KNOWN[name]
    if name not in schemas:
        # Before its fields: one of them may hold the message itself.
        schemas[name] = made = {"type": "object", "additionalProperties": False}
        made["properties"] = {field.json_name: _field(field, schemas) for field in descriptor.fields}
    return {"$ref": _REFERENCE + name}


def _field(field: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {
            "type": "object",
            "additionalProperties": _one(field.message_type.fields_by_name["value"], schemas),
        }
    one = _one(field, schemas)
    return {"type": "array", "items": one} if field.is_repeated else one


def _one(field: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        return _message(field.message_type, schemas)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    return _SCALARS[field.type]


def _json(properties: dict[str, Any], required: Iterable[str] = ()) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"application/json": {"schema": schema}}


def _openai_paths() -> dict[str, Any]:
    """Return OpenAI's routes; their fields are those that `openai.py` reads."""
    listed = {"type": "object", "properties": {"data": {"type": "array", "items": _MODEL}}}
    embeddings = {
        "input": {"oneOf": [_INPUT, {"type": "array", "items": _INPUT}]},
        "model": _MODEL_FIELD,
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "truncate_text": {"type": "boolean", "default": False},
    }
    images = {
        "prompt": {"type": "string"},
        "model": _MODEL_FIELD,
        "n": {"type": "integer", "minimum": 1, "maximum": 64, "default": 1},
        "size": {"type": "string", "pattern": "^([0-9]+x[0-9]+|auto)$", "default": "auto"},
        "response_format": {"const": "b64_json"},
        "output_format": {"enum": ["png", "webp"], "default": "png"},
        "seed": {"type": "integer", "description": "Of the first image; each further one has the next."},
        "steering": {"$ref": _REFERENCE + "monofacet.v1.Steering"},
        "negative_prompt": {"type": "string"},
        "num_inference_steps": {"type": "integer"},
        "guidance_scale": {"type": "number"},
    }

    def post(name: str, content: dict[str, Any]) -> dict[str, Any]:
        return {
            "post": {
                "operationId": name,
                "tags": ["OpenAI"],
                "requestBody": {"required": True, "content": content},
                "responses": _responses("application/json", {"type": "object"}, "OpenAIError"),
            }
        }

    def get(name: str, schema: dict[str, Any]) -> dict[str, Any]:
        answers = _responses("application/json", schema, "OpenAIError")
        return {"operationId": name, "tags": ["OpenAI"], "responses": answers}

    id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/embeddings": post("createEmbedding", _json(embeddings, ["input"])),
        "/v1/images/generations": post("createImage", _json(images, ["prompt"])),
        "/v1/models": {"get": get("listModels", listed)},
        "/v1/models/{id}": {"get": get("retrieveModel", _MODEL) | {"parameters": [id]}},
    }


def _health_paths() -> dict[str, Any]:
    """Return the routes of health, which need no token."""
    content = _json({"status": {"enum": ["SERVING", "NOT_SERVING"]}, "services": {"type": "object"}})

    def path(name: str, said: dict[str, str]) -> dict[str, Any]:
        answers = {status: {"description": what, "content": content} for status, what in said.items()}
        return {"get": {"operationId": name, "tags": ["Health"], "security": [{}], "responses": answers}}

    return {
        "/healthz": path("health", {"200": "The server answers."}),
        "/readyz": path("ready", {"200": "It serves.", "503": "It starts, or stops."}),
    }
