"""No request, however broken, is answered with anything but a status of the table.

`python -m benchmarks.fuzz` does the same with 10,000 cases a service; what it found once lies in corpus/.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.access.scopes import methods_of
from deployments.gateway.services import DESCRIPTORS
from services.bundle.load import Bundle
from tests.fuzz.gateway import CODE, calibrated, fuzz, fuzzed_gateway, send
from tests.fuzz.messages import Case, Maker

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))
CASES = 150
METHODS = [name for service in DESCRIPTORS for name in methods_of(service)]


@pytest.mark.parametrize("service", DESCRIPTORS, ids=lambda service: service.name)
async def test_hostile_messages_get_mapped_statuses(service: object, tiny: Bundle) -> None:
    async with fuzzed_gateway(tiny) as channel:
        findings = await fuzz(channel, Maker(service, seed=1).case, CASES)  # type: ignore[arg-type]
    assert [(case.method, wrong) for case, wrong in findings.amiss] == []
    assert findings.statuses.total() == CASES
    # Both what is right and what is wrong was reached, or the cases say nothing.
    # FAILED_PRECONDITION: the tiny bundle has no calibration for that call.
    assert findings.statuses["OK"] + findings.statuses["FAILED_PRECONDITION"] > 0
    assert findings.statuses["INVALID_ARGUMENT"] + findings.statuses["NOT_FOUND"] > 0


async def test_what_was_found_once_is_not_found_again(tiny: Bundle, tmp_path: Path) -> None:
    assert CORPUS
    amiss = []
    async with fuzzed_gateway(calibrated(tiny, tmp_path)) as channel:
        for path in CORPUS:
            case = Case.from_bytes(path.read_bytes())
            if case.method in METHODS:
                _, _, wrong = await send(channel, case)
                if wrong:
                    amiss.append((path.name, wrong))
    assert amiss == []


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.lists(st.binary(max_size=200), max_size=3), method=st.sampled_from(METHODS))
def test_the_files_of_the_corpus_say_what_was_sent(data: list[bytes], method: str) -> None:
    case = Case(method, tuple(data))
    assert Case.from_bytes(case.to_bytes()) == case


async def test_a_fault_of_the_server_would_be_found(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without it, the tests above could be blind."""
    from deployments.gateway.servicers import feature

    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(feature, "items_of", broken)
    encode = Case("monofacet.v1.FeatureService/Encode", (b"\x0a\x03\x12\x01a",))
    async with fuzzed_gateway(tiny) as channel:
        code, _, wrong = await send(channel, encode)
    assert code is CODE.INTERNAL
    assert wrong.startswith("INTERNAL: internal error")
