"""Statuses and reasons: what a call may be refused for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from contract import Contract

from deployments.gateway import errors as gateway
from services import errors as domain

# Reasons that single places give in place of their exception's own, with that exception.
OTHERS = {
    "DELTA_OUT_OF_REACH": (
        domain.InvalidInput,
        "No multiple of the edits changes the embedding by `Steering.delta`.",
    ),
    "DOSE_OUT_OF_REACH": (
        domain.InvalidInput,
        "No multiple of the edits changes the embedding by `Steering.dose`.",
    ),
    "FEATURE_NEVER_ACTIVE": (domain.InvalidInput, "A quantile of a feature that was never active."),
    "PAGE_TOKEN_INVALID": (domain.InvalidInput, "The page token is of another request, or is none."),
    "REFERENCE_REQUIRED": (
        domain.InvalidInput,
        "This pipeline is steered from a reference picture; none was given.",
    ),
    "REFERENCE_UNSUPPORTED": (domain.InvalidInput, "This pipeline takes no reference picture."),
    "STEERING_PATH_UNSUPPORTED": (
        domain.SteeringUnsupported,
        "This pipeline cannot be steered by that path.",
    ),
    "STEERING_TOWER_MISMATCH": (
        domain.SteeringUnsupported,
        "The pipeline takes embeddings of another tower than the one of the bundle's features.",
    ),
    "TOO_MANY_IMAGES": (
        domain.InvalidInput,
        "More images than `Limits.max_images`, unsteered twins counted.",
    ),
    "TOO_MANY_ITEMS": (domain.InvalidInput, "More items than `Limits.max_audit_items`."),
    "TOO_MANY_PAIRS": (domain.InvalidInput, "More pairs than `Limits.max_score_pairs`."),
}
_IMAGE = (
    "IMAGE_FORMAT_UNSUPPORTED",
    "IMAGE_TOO_LARGE",
    "IMAGE_TOO_SMALL",
    "IMAGE_TOO_COSTLY",
    "IMAGE_CORRUPT",
)
_STEERING = (
    "STEERING_UNSUPPORTED",
    "DELTA_OUT_OF_REACH",
    "DOSE_OUT_OF_REACH",
    "FEATURE_NEVER_ACTIVE",
    "UNKNOWN_ATTRIBUTE",
)
# What a request may be refused for that has a field of this name, or a message of this type, anywhere below it.
BY_CONTENT = {
    "Image": _IMAGE,
    "truncate_text": ("TEXT_TOO_LONG",),
    "dictionary": ("UNKNOWN_DICTIONARY",),
    "feature": ("UNKNOWN_FEATURE",),
    "ids": ("UNKNOWN_FEATURE",),
    "page_token": ("PAGE_TOKEN_INVALID",),
    "bundle": ("UNKNOWN_MODEL",),
    "Steering": _STEERING,
}
# And what single methods may be refused for besides.
BY_METHOD = {
    "GetAttribute": ("UNKNOWN_ATTRIBUTE",),
    "ScoreModality": ("NOT_ENOUGH_PAIRS", "STREAM_IDLE", "TOO_MANY_PAIRS"),
    "ClassifyGender": ("MODEL_NOT_CALIBRATED",),
    "AuditGender": ("MODEL_NOT_CALIBRATED", "NOT_ENOUGH_ITEMS", "STREAM_IDLE", "TOO_MANY_ITEMS"),
    "FilterAdversarial": ("MODEL_NOT_CALIBRATED",),
    "Generate": (
        "NO_PIPELINE",
        "STEERING_PATH_UNSUPPORTED",
        "STEERING_TOWER_MISMATCH",
        "REFERENCE_REQUIRED",
        "REFERENCE_UNSUPPORTED",
        "TOO_MANY_IMAGES",
        "GENERATION_FAILED",
    ),
}
# Reasons of the domain that no caller reads: they stop a start, or are roots of the tree with reasons below them.
UNSEEN = (domain.BundleError, domain.ImageError)


@dataclass(frozen=True)
class Reason:
    """One reason.

    Parameters
    ----------
    name
        As in ErrorInfo.
    status
        The name of its status code.
    when
        In a sentence.
    retry
        Whether RetryInfo says when to come again.
    """

    name: str
    status: str
    when: str
    retry: bool = False


def all_reasons() -> list[Reason]:
    """List every reason that a caller may read, by status and name."""
    found = {}
    for kind, answer in gateway.TABLE:
        if answer.reason is not None:
            reason = Reason(answer.reason, answer.code.name, _sentence(kind, answer), answer.retry)
            found.setdefault(answer.reason, reason)
    for kind in _tree(domain.MonofacetError):
        if kind is not domain.MonofacetError and not issubclass(kind, UNSEEN[0]) and kind is not UNSEEN[1]:
            found[kind.default_reason] = _of(kind, kind.default_reason, _sentence(kind))
    for name, (kind, when) in OTHERS.items():
        found[name] = _of(kind, name, when)
    found["INTERNAL"] = Reason(
        "INTERNAL", "INTERNAL", "A fault of the server; the message names the line of its log that says more."
    )
    return sorted(found.values(), key=lambda reason: (reason.status, reason.name))


def reasons_of(method: str, request: str, contract: Contract) -> list[str]:
    """List what a method may be refused for that not every method is.

    Parameters
    ----------
    method
        Its name.
    request
        The name of its request message.
    contract
        That has both.
    """
    content = {word for field in contract.reached(request) for word in field}
    names = {reason for word in content for reason in BY_CONTENT.get(word, ())}
    return sorted(names | set(BY_METHOD.get(method, ())))


def _of(kind: type[domain.MonofacetError], name: str, when: str) -> Reason:
    answer = gateway.answer_for(kind.__new__(kind))
    if answer.code is grpc.StatusCode.INTERNAL and kind is not domain.GenerationFailed:
        raise RuntimeError(f"{kind.__name__} is not in the gateway's table")
    return Reason(name, answer.code.name, when, answer.retry)


def _sentence(kind: type[BaseException], answer: gateway.Answer | None = None) -> str:
    if answer is not None and answer.message is not None:
        return answer.message[0].upper() + answer.message[1:] + "."
    return inspect.cleandoc(kind.__doc__ or "").splitlines()[0]


def _tree(kind: type[domain.MonofacetError]) -> Iterator[type[domain.MonofacetError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)
