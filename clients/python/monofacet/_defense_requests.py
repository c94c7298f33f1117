"""Requests of DefenseService. Pure: no channel is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from monofacet import _exceptions as exceptions
from monofacet._inputs import sendable
from monofacet._requests import enum_value
from monofacet._types import FilterMode
from monofacet.v1 import common_pb2, defense_service_pb2


@sendable("the options")
def filter_options(
    mode: FilterMode | str | None,
    keep_residual: bool | None,
    second_look: bool,
    filter_all: bool,
    max_features: int,
) -> defense_service_pb2.FilterOptions:
    """Make the options of FilterAdversarial.

    Parameters
    ----------
    mode
        In any case; None for the bundle's choice.
    keep_residual
        None for the bundle's choice.
    second_look, filter_all
        As in the contract.
    max_features
        Features listed an image, 0 to 1,000.

    Returns
    -------
    FilterOptions
        What is None stays unset.

    Raises
    ------
    InputError
        If there is no such mode, or the number cannot be sent.
    """
    if not 0 <= max_features <= 1000:
        raise exceptions.InputError(f"max_features is a number from 0 to 1000, not {max_features}")
    options = defense_service_pb2.FilterOptions(
        second_look=second_look, filter_all=filter_all, max_features=max_features
    )
    if keep_residual is not None:
        options.keep_residual = keep_residual
    if mode is not None:
        values = defense_service_pb2.FilterMode.DESCRIPTOR
        options.mode = enum_value(FilterMode, values, mode, "filter mode")
    return options


def label_texts(labels: Iterable[str]) -> list[str]:
    """Check zero-shot labels.

    Parameters
    ----------
    labels
        None at all for the bundle's.

    Returns
    -------
    list of str
        As they are.

    Raises
    ------
    InputError
        If there is one alone, or more than 255: an image needs room beside them.
    """
    texts = [labels] if isinstance(labels, str) else list(labels)
    if len(texts) == 1 or len(texts) > 255:
        raise exceptions.InputError(f"give no labels or 2 to 255, not {len(texts)}")
    return texts


@sendable("the request")
def filter_adversarial(
    images: Sequence[common_pb2.Input],
    labels: Sequence[str],
    options: defense_service_pb2.FilterOptions,
    truncate: bool,
) -> defense_service_pb2.FilterAdversarialRequest:
    """Make a FilterAdversarial request.

    Parameters
    ----------
    images
        A part of the batch.
    labels
        The same for all parts.
    options
        The same for all parts.
    truncate
        Whether long labels are cut.

    Returns
    -------
    FilterAdversarialRequest
        For one call.

    Raises
    ------
    InputError
        If one of the inputs is a text, or a label cannot be sent.
    """
    texts = [item.text for item in images if item.WhichOneof("input") == "text"]
    if texts:
        raise exceptions.InputError(f"only images can be judged, not the text {texts[0][:40]!r}")
    return defense_service_pb2.FilterAdversarialRequest(
        images=[item.image for item in images], labels=labels, options=options, truncate_text=truncate
    )
