"""The settings explain themselves, and the environment reaches every one of them."""

from __future__ import annotations

import pickle
import socket
from contextlib import suppress

import pytest
from pydantic import ValidationError

from deployments.operations.addresses import joined
from deployments.operations.settings import Settings, service_links
from deployments.serve import with_free_http_port
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


@pytest.mark.parametrize("name", ["port", "health_port", "http_port", "metrics_port"])
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


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = {
        "MONOFACET_SERVICE_HOST": "10.96.0.12",
        "MONOFACET_SERVICE_PORT": "9000",
        "MONOFACET_PORT": "tcp://10.96.0.12:9000",
        "MONOFACET_PORT_9000_TCP": "tcp://10.96.0.12:9000",
        "MONOFACET_PORT_9000_TCP_PROTO": "tcp",
        "MONOFACET_METRICS_PORT": "tcp://10.96.0.13:9100",
        "MONOFACET_HEALTH_PORT": "udp://10.96.0.14:9001",
    }
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.port, settings.metrics_port, settings.health_port) == (9000, 9100, 0)
    assert service_links(links) == ["MONOFACET_PORT", "MONOFACET_HEALTH_PORT", "MONOFACET_METRICS_PORT"]
    assert Settings(port=9007).port == 9007
    monkeypatch.setenv("MONOFACET_PORT", "nine thousand")
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize(
    ("written", "address"), [("::1", "[::1]:9000"), ("[::1]", "[::1]:9000"), ("localhost", "localhost:9000")]
)
def test_an_ipv6_address_may_be_written_with_brackets_or_without(written: str, address: str) -> None:
    settings = Settings(host=written, metrics_host=written)
    assert joined(settings.host, settings.port) == address
    assert settings.metrics_host == settings.host


@pytest.mark.parametrize("host", ["", " ", "[]"])
def test_no_address_is_no_host(host: str) -> None:
    with pytest.raises(ValidationError, match="an address is missing"):
        Settings(host=host)


def test_no_two_servers_share_a_port() -> None:
    with pytest.raises(ValidationError, match="port and metrics_port are both 9000"):
        Settings(metrics_port=9000)
    with pytest.raises(ValidationError, match="health_port and metrics_port are both 9001"):
        Settings(health_port=9001, metrics_port=9001, metrics_host="0.0.0.0")
    # 0 is a free one for each, and another address has ports of its own.
    assert Settings(port=0, metrics_port=0).metrics_port == 0
    assert Settings(metrics_port=9000, metrics_host="127.0.0.2").metrics_port == 9000


def test_http_gives_its_default_port_up_to_whoever_has_it() -> None:
    assert Settings().http_port == 8080
    for others in ({"port": 0}, {"port": 8080}, {"metrics_port": 8080}, {"health_port": 8080}):
        assert Settings(**others).http_port == 0
    with pytest.raises(ValidationError, match="port and http_port are both 8080"):
        Settings(port=8080, http_port=8080)
    with socket.socket() as taken:
        # Where another program has it, so much the better.
        with suppress(OSError):
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        assert with_free_http_port(Settings()).http_port == 0
        assert with_free_http_port(Settings(http_port=8080)).http_port == 8080
    assert not with_free_http_port(Settings(http=False)).http
