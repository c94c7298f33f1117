"""Filtering, ordering and paging of a modality table."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

import numpy as np
from monofacet.v1 import modality_service_pb2 as pb
from numpy.typing import NDArray

from deployments.gateway.cards import label_name
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

_ORDER_PREFIX = "FEATURE_ORDER_"


def matching(table: ModalityTable, wanted: pb.FeatureFilter) -> NDArray[np.int64]:
    """Return the features that pass every condition of `wanted`, ascending.

    An undefined figure is NaN, which passes no comparison.
    """
    keep = np.ones(len(table), bool)
    if wanted.labels:
        keep &= np.isin(table.label, [label_name(label) for label in wanted.labels])
    firing = np.fmax(table.firing_rate_image, table.firing_rate_text)
    for field, column, at_least in (
        ("min_mds", table.mds_energy, True),
        ("max_mds", table.mds_energy, False),
        ("min_firing_rate", firing, True),
        ("max_firing_rate", firing, False),
    ):
        if wanted.HasField(field):  # type: ignore[arg-type]
            bound = np.float32(getattr(wanted, field))
            keep &= (column >= bound) if at_least else (column <= bound)
    if wanted.name_contains:
        part = wanted.name_contains.casefold()
        keep &= np.array([part in str(name).casefold() for name in table.name], bool)
    if wanted.HasField("coactivation_significant"):
        keep &= table.coactivation_significant == wanted.coactivation_significant
    return np.flatnonzero(keep)


def ordered(
    table: ModalityTable, features: NDArray[np.int64], order: pb.FeatureOrder.ValueType, descending: bool
) -> NDArray[np.int64]:
    """Return `features` in the order asked for; what is undefined or unnamed comes last both ways."""
    column = pb.FeatureOrder.Name(order).removeprefix(_ORDER_PREFIX).lower()
    column = {"unspecified": "feature", "mds": "mds_energy"}.get(column, column)
    values = getattr(table, column)[features]
    missing = values == "" if values.dtype.kind == "U" else np.isnan(values.astype(np.float64))
    defined, undefined = features[~missing], features[missing]
    values = values[~missing]
    # Ties by feature id, in both directions: a stable sort of the reversed list, reversed.
    rank = np.argsort(values[::-1], kind="stable")[::-1] if descending else np.argsort(values, kind="stable")
    if descending:
        rank = len(values) - 1 - rank
    return np.concatenate([defined[rank], undefined])


def _query_digest(request: pb.ListFeaturesRequest, bundle: str) -> str:
    query = pb.ListFeaturesRequest()
    query.CopyFrom(request)
    query.ClearField("page_token")
    query.ClearField("page_size")
    # By its name or by its id, it is the same bundle.
    query.ClearField("bundle")
    data = query.SerializeToString(deterministic=True) + bundle.encode()
    return hashlib.sha256(data).hexdigest()[:16]


def page_start(request: pb.ListFeaturesRequest, bundle: str) -> int:
    """Return the position that the request's page token stands for; 0 without one.

    Raises
    ------
    InvalidInput
        For a token that this query, on this bundle, did not give.
    """
    if not request.page_token:
        return 0
    try:
        start, digest = json.loads(base64.urlsafe_b64decode(request.page_token))
        if digest == _query_digest(request, bundle) and isinstance(start, int) and start >= 0:
            return start
    except (ValueError, TypeError, binascii.Error):
        pass
    message = "not a page token of this query"
    raise InvalidInput(message, [("page_token", message)], reason="PAGE_TOKEN_INVALID")


def page_token(request: pb.ListFeaturesRequest, bundle: str, start: int) -> str:
    """Return the token for the page that begins at `start`."""
    token = json.dumps([start, _query_digest(request, bundle)])
    return base64.urlsafe_b64encode(token.encode()).decode()
