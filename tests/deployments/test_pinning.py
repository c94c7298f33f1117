"""Weights are verified by whoever loads them, and only the bundle that was asked for is served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from deployments import serve
from deployments.cluster.app import GatewayReplica
from deployments.cluster.replicas import EncoderReplica, GeneratorReplica
from deployments.encoder.tasks import EncoderFault
from deployments.operations.served import WrongBundle, load_served, read_served
from deployments.operations.settings import Settings
from services.bundle.load import CLIP_WEIGHTS, Bundle
from services.errors import BundleError, BundleFileError


@pytest.fixture
def copy(tiny: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "bundle"))


def change_weights(path: Path) -> None:
    """Change one bit of the last weight; the size stays."""
    weights = bytearray((path / CLIP_WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (path / CLIP_WEIGHTS).write_bytes(weights)


def settings_of(path: Path, **options: Any) -> Settings:
    (served,) = read_served(Settings(bundle=path, threads=1, tune=False, backend="torch", **options))
    return served.settings


def test_a_replica_refuses_weights_that_changed_since_the_server_started(copy: Path) -> None:
    settings = settings_of(copy)
    assert load_served(settings).path == copy
    change_weights(copy)
    with pytest.raises(BundleFileError, match="wrong SHA-256"):
        load_served(settings)


def test_a_replica_refuses_another_whole_bundle_in_the_same_place(copy: Path) -> None:
    settings = settings_of(copy)
    text = (copy / "manifest.json").read_text()
    changed = text.replace(Bundle.load(copy).manifest.description, "another", 1)
    assert changed != text
    (copy / "manifest.json").write_text(changed)
    Bundle.load(copy)
    with pytest.raises(WrongBundle, match="the bundle is tiny@.* and only tiny@[0-9a-f]{12} may be served"):
        load_served(settings)


@pytest.mark.parametrize("replica", [EncoderReplica, GeneratorReplica])
async def test_a_replica_that_starts_on_changed_weights_says_why_it_does_not_serve(
    copy: Path, replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.cluster.replicas.confine_to_loopback", lambda _: None)
    monkeypatch.setattr("deployments.cluster.replicas.logs.configure", lambda *_: None)
    settings = settings_of(copy)
    change_weights(copy)
    made = replica(settings)
    info = made.info() if replica is EncoderReplica else await made.info()
    assert info == EncoderFault(f"BundleFileError: {CLIP_WEIGHTS}: wrong SHA-256")


async def test_a_gateway_reads_no_tables_that_changed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.cluster.app.confine_to_loopback", lambda _: None)
    monkeypatch.setattr("deployments.cluster.app.logs.configure", lambda *_: None)
    served = read_served(Settings(bundle=copy))
    change_weights(copy)
    with pytest.raises(BundleError):
        await GatewayReplica.__new__(GatewayReplica).__init__(served[0].settings, served, [None], [None])


def test_only_the_pinned_bundle_may_be_served(tiny: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    name, full = tiny.manifest.name, f"{tiny.manifest.name}@{tiny.sha256}"
    for pinned in ((tiny.id,), (full,), (f"other@{'0' * 12}", tiny.id)):
        assert read_served(Settings(bundle=tiny.path, bundle_ids=pinned))[0].name == name
    wrong = f"{full[:-1]}{'0' if full[-1] != '0' else '1'}"
    for pinned in ((wrong,), (f"{name}@{'0' * 12}",)):
        with pytest.raises(WrongBundle):
            read_served(Settings(bundle=tiny.path, bundle_ids=pinned))
    with pytest.raises(typer.Exit) as stopped:
        serve._check(Settings(bundle=tiny.path, bundle_ids=(f"{name}@{'0' * 12}",)))
    assert stopped.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the bundle is {tiny.id}, and only {name}@000000000000 may be served" in line


def test_ids_are_read_from_the_environment_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = (f"a@{'0' * 12}", f"b@{'f' * 64}")
    for text in (", ".join(ids), f'["{ids[0]}", "{ids[1]}"]'):
        monkeypatch.setenv("MONOFACET_BUNDLE_IDS", text)
        assert Settings().bundle_ids == ids
    for bad in ("a", "a@12", f"a@{'0' * 65}", f"a@{'G' * 12}", f"@{'0' * 12}"):
        monkeypatch.setenv("MONOFACET_BUNDLE_IDS", bad)
        with pytest.raises(ValidationError, match="no id of a bundle"):
            Settings()
