"""The settings explain themselves, and the environment reaches every one of them."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from deployments.settings import Settings
from services.encoding.images import MAX_PIXELS


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_knob_has_a_default_and_says_what_it_is_for(name: str) -> None:
    knob = Settings.model_fields[name]
    assert not knob.is_required()
    assert knob.description and len(knob.description.split()) >= 4


def test_the_environment_overrides_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOFACET_MAX_ITEMS", "12")
    assert Settings().max_items == 12


def test_a_senseless_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOFACET_MAX_ITEMS", "0")
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize("name", ["port", "health_port", "metrics_port"])
def test_the_address_of_a_service_of_kubernetes_is_no_port_that_was_set(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # In every pod beside Services named monofacet, monofacet-health and monofacet-metrics.
    default = getattr(Settings(), name)
    monkeypatch.setenv(f"MONOFACET_{name.upper()}", "tcp://10.0.0.1:9000")
    assert getattr(Settings(), name) == default
    assert getattr(Settings(**{name: 9005}), name) == 9005
    monkeypatch.setenv(f"MONOFACET_{name.upper()}", "tcp://")
    with pytest.raises(ValidationError):
        Settings()


def test_an_image_may_not_have_more_pixels_than_the_contract_allows() -> None:
    with pytest.raises(ValidationError):
        Settings(max_image_pixels=MAX_PIXELS + 1)


def test_replicas_get_the_same_settings() -> None:
    settings = Settings(port=1234)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_nothing_listens_to_a_network_by_default() -> None:
    assert Settings().host == "127.0.0.1"
