"""OpenAI's routes: embeddings, models and images, as OpenAI's own clients call them."""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf import json_format
from monofacet.v1 import common_pb2, feature_service_pb2, imaging_service_pb2, model_service_pb2

from deployments.gateway.http.bodies import Body, dumps, loads, media_type, send_json
from deployments.gateway.http.calls import CallFailed, Calls, HttpContext, answer_headers, http_status
from deployments.gateway.interceptors.reading import Received
from services.errors import InvalidInput

# As OpenAI's own server takes; they are encoded in calls of as many as the server takes at once.
MAX_INPUTS = 2_048
_MODELS = "/v1/models"
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_DATA_URI = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,")
# Fields of OpenAI's requests that change nothing here.
_IDLE = frozenset({"user"})
# Fields of `GenerateRequest` that a request for images may have beside OpenAI's, in the contract's JSON.
_GENERATE = frozenset(
    {"steering", "negative_prompt", "seeds", "num_inference_steps", "guidance_scale", "truncate_text"}
)
_FORMATS = {
    "png": imaging_service_pb2.IMAGE_FORMAT_PNG,
    "webp": imaging_service_pb2.IMAGE_FORMAT_WEBP,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "server_error",
}
_KINDS = {str: "a string", int: "an integer", bool: "true or false"}
# Of our fields, what OpenAI calls them.
_PARAMETERS = (
    (re.compile(r"^inputs"), "input"),
    (re.compile(r"^bundle$"), "model"),
    (re.compile(r"^num_images$"), "n"),
    (re.compile(r"^(height|width)$"), "size"),
)


def refused(parameter: str, why: str, reason: str = "PARAMETER_INVALID") -> InvalidInput:
    """Return an error that blames one field of the request's JSON."""
    return InvalidInput(f"{parameter}: {why}", [(parameter, why)], reason=reason)


def error_body(status: int, message: str, parameter: str | None = None, code: str | None = None) -> bytes:
    """Return an error in OpenAI's shape; `code` is the reason that gRPC's ErrorInfo has."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return dumps({"error": {"message": message, "type": kind, "param": parameter, "code": code}})


class OpenAI:
    """Answers OpenAI's routes.

    Parameters
    ----------
    calls
        Runs the calls that they are made of.
    max_bytes
        Of one body.
    max_items
        Inputs of one call.
    """

    def __init__(self, calls: Calls, max_bytes: int, max_items: int) -> None:
        self._calls = calls
        self._max_bytes = max_bytes
        self._max_items = max_items
        self._posts: Mapping[str, Callable[..., Any]] = {
            "/v1/embeddings": self._embeddings,
            "/v1/images/generations": self._images,
        }

    def __contains__(self, path: str) -> bool:
        return path in self._posts or path == _MODELS or path.startswith(f"{_MODELS}/")

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one HTTP request whose path is one of ours."""
        path, headers = scope["path"], scope["headers"]
        answer = self._posts.get(path)
        allowed = "GET" if answer is None else "POST"
        if scope["method"] != allowed:
            said = error_body(405, f"{path} takes {allowed}")
            await send_json(send, 405, said, [(b"allow", allowed.encode())])
            return
        if answer is not None and media_type(headers) != "application/json":
            # Also because a browser asks a server before it sends this type for a page of somebody else's.
            await send_json(send, 415, error_body(415, "the body must be application/json"))
            return
        body = Body(receive, headers, self._max_bytes)
        context = HttpContext(scope["client"], headers)
        if answer is None:
            body.ended.set()
            work = self._models(scope["raw_path"], context)
        else:
            work = answer(body, context)
        try:
            value = await body.unless_gone(work)
        except CallFailed as error:
            await send_failure(send, error, context.request_id)
            return
        await send_json(send, 200, dumps(value), answer_headers(context.request_id))

    async def _embeddings(self, body: Body, context: HttpContext) -> dict[str, Any]:
        """Encode; more inputs than one call takes are encoded by several calls, one after another."""
        requests: list[Any] = []
        plain = False

        def read(data: bytes) -> Any:
            nonlocal plain
            made, plain = self._encode_requests(loads(data))
            requests.extend(made)
            return requests.pop(0)

        responses = [
            await self._calls.run("monofacet.v1.FeatureService/Encode", body.messages(read), context)
        ]
        for request in requests:
            responses.append(
                await self._calls.run("monofacet.v1.FeatureService/Encode", _one(request), context)
            )
        rows = np.concatenate([_rows(response.embeddings) for response in responses])
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": row.tolist() if plain else _base64(row)}
                for i, row in enumerate(rows)
            ],
            "model": responses[0].bundle,
            # The gateway does not count tokens; what an input costs hardly depends on them.
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }

    def _encode_requests(self, value: Any) -> tuple[list[Any], bool]:
        """Return the calls that a request for embeddings is, and whether floats are wanted as numbers."""
        _fields(value, {"input", "model", "encoding_format", "dimensions", "truncate_text"})
        if value.get("dimensions") is not None:
            why = "vectors have the size that the model was trained for; a part of one is not an embedding"
            raise refused("dimensions", why, "PARAMETER_UNSUPPORTED")
        form = _of(value, "encoding_format", str, "float")
        if form not in ("float", "base64"):
            raise refused("encoding_format", "must be `float` or `base64`")
        inputs = _inputs(value.get("input"))
        options = feature_service_pb2.EncodeOptions(truncate_text=_of(value, "truncate_text", bool, False))
        bundle = _of(value, "model", str, "")
        made = [
            feature_service_pb2.EncodeRequest(
                inputs=inputs[i : i + self._max_items], options=options, bundle=bundle
            )
            for i in range(0, len(inputs), self._max_items)
        ]
        return made, form == "float"

    async def _models(self, raw_path: bytes, context: HttpContext) -> dict[str, Any]:
        id = unquote(raw_path.decode("ascii")).removeprefix(_MODELS).removeprefix("/")
        if not id:
            listing = _one(model_service_pb2.ListModelsRequest())
            response = await self._calls.run("monofacet.v1.ModelService/ListModels", listing, context)
            return {"object": "list", "data": [_model(model) for model in response.models]}
        request = model_service_pb2.GetModelRequest(bundle=id)
        response = await self._calls.run("monofacet.v1.ModelService/GetModel", _one(request), context)
        return _model(response.model)

    async def _images(self, body: Body, context: HttpContext) -> dict[str, Any]:
        images: list[Any] = []
        bundle = ""

        async def take(event: Any) -> None:
            nonlocal bundle
            if event.WhichOneof("event") == "image":
                images.append(event.image)
                bundle = event.bundle

        context.write = take
        created = int(time.time())
        messages = body.messages(lambda data: _generate_request(loads(data)))
        await self._calls.run("monofacet.v1.ImagingService/Generate", messages, context)
        for image in images:
            if image.HasField("error"):
                raise failed_image(image.error)
        images.sort(key=lambda image: image.index)
        return {"created": created, "model": bundle, "data": [_image(image) for image in images]}


def failed_image(status: Any) -> CallFailed:
    """Return the failure of a request one of whose images failed."""
    codes = {code.value[0]: code for code in grpc.StatusCode}
    return CallFailed(codes.get(status.code, grpc.StatusCode.INTERNAL), status)


async def send_failure(send: Any, error: CallFailed, request_id: str) -> None:
    """Answer with an error in OpenAI's shape."""
    status = http_status(error)
    parameter = next(iter(error.fields), None)
    for pattern, name in _PARAMETERS:
        parameter = pattern.sub(name, parameter) if parameter is not None else None
    body = error_body(status, error.status.message, parameter, error.reason or None)
    await send_json(send, status, body, answer_headers(request_id, error))


async def _one(message: Any) -> AsyncIterator[Received]:
    yield Received(message.ByteSize(), message)


def _rows(tensor: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def _base64(row: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(row.tobytes()).decode()


def _fields(value: Any, known: set[str]) -> None:
    """Raise unless a value is an object with no fields but those."""
    if not isinstance(value, dict):
        raise refused("body", "must be a JSON object")
    for name in value:
        if name not in known and name not in _IDLE:
            raise refused(name[:80], "is no parameter of this server", "PARAMETER_UNSUPPORTED")


def _of(value: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field of a JSON type; null and its absence are the default."""
    found = value.get(name)
    if found is None:
        return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise refused(name, f"must be {_KINDS[kind]}")
    return _utf8(found, name) if isinstance(found, str) else found


def _inputs(value: Any) -> list[Any]:
    """Return what is to be encoded: one thing, or a list of them."""
    listed = value if isinstance(value, list) else [value]
    if not 0 < len(listed) <= MAX_INPUTS:
        raise refused("input", f"has {len(listed)} items; 1 to {MAX_INPUTS} are allowed")
    return [
        _input(item, f"input[{i}]" if isinstance(value, list) else "input") for i, item in enumerate(listed)
    ]


def _input(item: Any, where: str) -> Any:
    if isinstance(item, str):
        if _DATA_URI.match(item):
            return _picture(item, where)
        return common_pb2.Input(text=_utf8(item, where))
    if isinstance(item, dict) and len(item) == 1:
        ((kind, content),) = item.items()
        if kind == "text" and isinstance(content, str):
            return common_pb2.Input(text=_utf8(content, where))
        if kind == "image" and isinstance(content, str):
            return _picture(content, where)
    if isinstance(item, int) or (isinstance(item, list) and all(isinstance(one, int) for one in item)):
        why = "tokens of another tokenizer mean nothing here; send the text"
        raise refused(where, why, "TOKENS_UNSUPPORTED")
    raise refused(where, 'must be a text, a data URI of an image, {"text": ...} or {"image": ...}')


def _utf8(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(where, "has half a surrogate pair, which is no character") from None
    return text


def _picture(content: str, where: str) -> Any:
    """Return the image of a data URI, or of base64 alone."""
    if content.startswith(("http://", "https://")):
        raise refused(where, "the server fetches no addresses; send the image itself as a data URI")
    encoded = content[match.end() :] if (match := _DATA_URI.match(content)) else content
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise refused(where, "is not an image in base64") from None
    return common_pb2.Input(image=common_pb2.Image(data=data))


def _model(model: Any) -> dict[str, Any]:
    # When a bundle was made is not known.
    return {"id": model.bundle, "object": "model", "created": 0, "owned_by": "monofacet"}


def _generate_request(value: Any) -> Any:
    """Return the call that a request for images is."""
    known = {"prompt", "model", "n", "size", "response_format", "output_format", "seed", "stream", *_GENERATE}
    _fields(value, known)
    if _of(value, "response_format", str, "b64_json") != "b64_json":
        raise refused(
            "response_format", "must be `b64_json`: the server keeps no images", "PARAMETER_UNSUPPORTED"
        )
    if _of(value, "stream", bool, False):
        why = "is not supported here; the call ImagingService/Generate streams, also over HTTP"
        raise refused("stream", why, "PARAMETER_UNSUPPORTED")
    form = _of(value, "output_format", str, "png")
    if form not in _FORMATS:
        raise refused("output_format", f"must be one of {', '.join(_FORMATS)}")
    request = imaging_service_pb2.GenerateRequest()
    if form != "png":
        # What is the default is not set: the request is kept in the picture, the same for the same picture.
        request.format = _FORMATS[form]
    own = {name: value[name] for name in _GENERATE if value.get(name) is not None}
    try:
        json_format.ParseDict(own, request)
    except Exception as error:  # ParseError; TypeError, AttributeError or RecursionError for some values
        raise refused("steering" if "steering" in own else "body", str(error)[:300]) from None
    request.prompt = _of(value, "prompt", str, "")
    request.bundle = _of(value, "model", str, "")
    count = _of(value, "n", int, 1)
    if not 1 <= count <= 64:
        raise refused("n", "must be 1 to 64")
    if value.get("n") is not None and value.get("seed") is None:
        request.num_images = count
    seed = _of(value, "seed", int, None)
    if seed is not None:
        if request.seeds:
            raise refused("seed", "give `seed` or `seeds`")
        if not 0 <= seed <= 2**63 - count:
            raise refused("seed", "must be 0 to 2^63 - 1")
        request.seeds.extend(range(seed, seed + count))
    size = _of(value, "size", str, "auto")
    if size != "auto":
        if (match := _SIZE.fullmatch(size)) is None:
            raise refused("size", "must be WIDTHxHEIGHT in pixels, or `auto`")
        request.width, request.height = int(match[1]), int(match[2])
    return request


def _image(image: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "b64_json": base64.b64encode(image.image.data).decode(),
        "seed": image.seed,
        "delta": image.delta,
    }
    if image.HasField("dose"):
        made["dose"] = image.dose
    return made
