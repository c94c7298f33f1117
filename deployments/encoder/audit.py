"""Computes audits where the dictionaries are: in the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.batching import DeadlineExpired
from deployments.encoder.tasks import AuditRequest
from services.bias.ablation import Mode, Side
from services.bias.audit import Audit, AuditSettings, audit
from services.bias.cases import Cases
from services.bias.plan import Plan
from services.check import Check
from services.dictionaries.base import Dictionary, Modality, SparseRow
from services.modality.scores import stack_rows


def until(remaining_s: float | None, cancelled: Callable[[], bool]) -> Check:
    """Return what raises DeadlineExpired once the deadline, counted from now, has passed or the caller has gone.

    Parameters
    ----------
    remaining_s
        Seconds until the caller's deadline; None for none.
    cancelled
        Whether the caller has gone.
    """
    end = None if remaining_s is None else time.monotonic() + remaining_s

    def check() -> None:
        if cancelled() or (end is not None and time.monotonic() >= end):
            raise DeadlineExpired

    return check


def run_audit(request: AuditRequest, dictionary: Dictionary, check: Check) -> tuple[Audit, ...]:
    """Audit every ablation of `request`.

    Parameters
    ----------
    request
        Items and ablations.
    dictionary
        The one that the request names.
    check
        Called between steps; what it raises ends the audits.

    Raises
    ------
    NotEnoughItems
        With items of either gender of too few clusters.
    """
    with torch.inference_mode():
        sides = {
            modality: Side(dictionary.decoder_rows(modality).numpy(), request.means[modality])
            for modality in Modality
        }
    cases = Cases(
        request.unit,
        stack_rows([SparseRow(row.indices, row.values) for row in request.features], dictionary.n_features),
        request.is_text,
        request.gender,
        np.array(request.profession),
        cluster_numbers(request.cluster),
    )
    settings = AuditSettings(
        request.logit_scale, request.bootstrap_samples, request.null_sets, request.min_group, request.seed
    )
    audits = []
    for mode, features in request.plans:
        check()
        plan = (
            Plan(Mode.LEACE, request.leace)
            if features is None
            else Plan.of_features(sides, features, Mode(mode))
        )
        audits.append(audit(cases, request.direction, sides, plan, settings, check))
    return tuple(audits)


def cluster_numbers(names: tuple[str, ...]) -> NDArray[np.int64]:
    """Return one number an item, the same for items of one cluster."""
    numbers: dict[object, int] = {}
    # An item without a cluster gets a key that no name can be.
    return np.array([numbers.setdefault(name or i, len(numbers)) for i, name in enumerate(names)], np.int64)
