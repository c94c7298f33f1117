"""BiasService in the real service: scores, an audit computed in the encoder's process, and a deadline that is felt."""

from __future__ import annotations

from collections.abc import Iterator

import monofacet
import pytest
from monofacet import Ablation, AuditSettings, LabelledItem

from tests.support.service import Service
from tests.support.waiting import CALL_S

GENDERS = ("woman", "man", None)


def people(count: int) -> Iterator[LabelledItem]:
    for i in range(count):
        yield LabelledItem(f"person {i}", GENDERS[i % 3], ("cook", "pilot")[i % 2], id=f"item {i}")


def test_every_kind_of_ablation_is_answered(service: Service) -> None:
    ablations = [
        Ablation(top_gender_features=4),
        Ablation(label="CROSS", mode="mean"),
        Ablation(features=[1, 2], mode="project"),
        Ablation(mode="leace"),
    ]
    with monofacet.Client(service.target, timeout=CALL_S) as client:
        for ablation in ablations:
            result = client.classify_gender(["a cook", "a pilot"], ablation=ablation)
            assert all(item.after is not None for item in result.classifications)
            assert all(-1 <= (item.kept or 0) <= 1.00001 for item in result.classifications)


def test_an_audit_names_what_it_left_out_and_says_what_it_did(service: Service) -> None:
    broken = LabelledItem(b"no picture", "woman", id="broken")
    settings = AuditSettings(
        [Ablation(top_gender_features=4), Ablation(mode="leace")], skip_bad_items=True, null_sets=100
    )
    with monofacet.Client(service.target, timeout=CALL_S) as client:
        result = client.audit_gender([*people(60), broken], settings)
    assert (result.women, result.men, result.ungendered) == (20, 20, 20)
    assert [(item.index, item.id) for item in result.skipped_items] == [(60, "broken")]
    assert [len(audit.nulls) > 0 for audit in result.audits] == [True, False]


def test_a_deadline_ends_an_audit_and_the_next_one_is_answered(service: Service) -> None:
    long = AuditSettings(bootstrap_samples=10_000, null_sets=10_000)
    with monofacet.Client(service.target, timeout=CALL_S) as client:
        with pytest.raises(monofacet.DeadlineError):
            client.audit_gender(people(300), long, timeout=3)
        # The client alone would hear of it in time; that the one place is free again shows that the server felt it.
        result = client.audit_gender(people(30), AuditSettings(null_sets=100, bootstrap_samples=100))
    assert result.women == 10
