"""From one's own pictures and a CSV to a served bundle: built, killed half-way, resumed to the same bytes, and used."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from monofacet import Ablation, Client, SteeringEdit

from services.bundle.load import Bundle
from tests.support.own_pairs import from_cards, from_corpus
from tests.support.own_pipeline import write_own_pipeline
from tests.support.service import Service, start_service
from tests.support.waiting import CALL_S

# `OWN_PICTURES=2000 pytest tests/e2e/test_own_bundle.py` does it at length, on openmoji's drawings in `work/corpus` and
# with every size as a user gets it; without, in a minute, on pictures that the embedded bundle ships.
AT_LENGTH = "OWN_PICTURES" in os.environ
PICTURES = int(os.environ.get("OWN_PICTURES", "400"))
LIMIT_S = 7200 if AT_LENGTH else 600
pytestmark = pytest.mark.timeout(2 * LIMIT_S)

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "bundles" / "emoji"
SHARD_ROWS = 40
SIZES = ("--shard-rows", str(SHARD_ROWS), "--workers", "1", "--name", "own")
if not AT_LENGTH:
    SIZES += (
        "--steps", "12", "--features", "64", "--k", "8", "--attack-images", "6", "--attack-steps", "2",
        "--resamples", "20",
    )  # fmt: skip
# Shards that must be there before the first run is killed.
HALF_WAY = PICTURES // SHARD_ROWS // 2


def build(out: Path, pairs: Path, pipeline: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-c", "from monofacet.cli import main; main()", "bundle", "build", str(out),
        "--model", str(EMOJI / "clip"), "--pairs", str(pairs), "--pipeline", str(pipeline), *SIZES,
    ]  # fmt: skip
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], out: Path) -> Bundle:
    assert process.wait(LIMIT_S) == 0, out.with_suffix(".log").read_text()
    return Bundle.load(out)


def killed_and_resumed(out: Path, pairs: Path, pipeline: Path) -> Bundle:
    process = build(out, pairs, pipeline)
    embeddings = out.with_name(f"{out.name}.work") / "embeddings"
    while len(list(embeddings.glob("*/*-*.json"))) < HALF_WAY:
        assert process.poll() is None, out.with_suffix(".log").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    made = {path: path.stat().st_mtime_ns for path in embeddings.glob("*/*-*.json")}
    assert len(made) < PICTURES // SHARD_ROWS, "it was too late to be killed"
    bundle = finish(build(out, pairs, pipeline), out)
    # What was there was not made again.
    assert {path: path.stat().st_mtime_ns for path in made} == made
    return bundle


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "mine"
    if AT_LENGTH:
        from_corpus(ROOT / "work" / "corpus", folder, PICTURES)
    else:
        from_cards(Bundle.load(EMOJI, verify=False), folder, PICTURES)
    with (folder / "pairs.csv").open("a") as file:
        file.write("images/nowhere.png,a picture that is not there,,,\n")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    return write_own_pipeline(folder, Bundle.load(EMOJI, verify=False))


@pytest.fixture(scope="module")
def bundles(pairs: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    with ThreadPoolExecutor(2) as beside:
        straight = beside.submit(finish, build(folder / "straight", pairs, pipeline), folder / "straight")
        resumed = beside.submit(killed_and_resumed, folder / "resumed", pairs, pipeline)
        return straight.result(), resumed.result()


@pytest.fixture(scope="module")
def service(bundles: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    started = start_service(bundles[1].path, tmp_path_factory.mktemp("service") / "service.log")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.target, timeout=CALL_S) as client:
        yield client


@pytest.fixture(scope="module")
def picture(pairs: Path) -> Path:
    return sorted((pairs / "images").iterdir())[0]


@pytest.fixture(scope="module")
def person(pairs: Path) -> Path:
    with (pairs / "pairs.csv").open(encoding="utf-8") as file:
        return pairs / next(row["path"] for row in csv.DictReader(file) if row["gender"])


def test_a_build_that_was_killed_comes_to_the_same_bytes(bundles: tuple[Bundle, Bundle]) -> None:
    straight, resumed = bundles
    assert resumed.manifest.files == straight.manifest.files
    assert resumed.id == straight.id


def test_the_bundle_has_everything(bundles: tuple[Bundle, Bundle], pairs: Path) -> None:
    manifest = bundles[0].manifest
    assert set(manifest.dictionaries) == {"neurons", "sae", "sae-group", "sae-pair", "ncl"}
    assert (
        set(manifest.modality)
        == set(manifest.steering)
        == set(manifest.cards.tables)
        == set(manifest.dictionaries)
    )
    assert manifest.bias and manifest.defense and manifest.diffusion and manifest.samples
    assert manifest.provenance["pairs"]["skipped"] == 1
    assert sum(manifest.provenance["pairs"].values()) == PICTURES + 1
    cards = bundles[0].cards()
    assert any(card.thumbnail for j in range(64) for card in cards.top(j, "image", 1))
    assert str(pairs) not in (bundles[0].path / "manifest.json").read_text()


def test_the_skipped_row_is_listed_with_its_reason(bundles: tuple[Bundle, Bundle]) -> None:
    work = bundles[0].path.with_name("straight.work")
    header, row = (work / "bad_rows.csv").read_text().splitlines()
    assert header == "file,row,key,reason"
    assert row.startswith(f"pairs.csv,{PICTURES},images/nowhere.png,cannot be read")


def test_the_bundle_serves_its_towers_and_dictionaries(client: Client, picture: Path) -> None:
    assert client.encode([picture, "a red heart"], dictionary="sae").embeddings.shape[0] == 2
    (found,) = client.classify_modality([picture]).classifications
    assert found.top_features


def test_people_are_classified_before_and_after_an_ablation(client: Client, person: Path) -> None:
    (item,) = client.classify_gender([person], ablation=Ablation(top_gender_features=8)).classifications
    assert 0 < item.before.p_woman < 1
    assert item.after is not None
    assert item.after.p_woman != item.before.p_woman


def test_adversarial_pictures_are_filtered(client: Client, picture: Path) -> None:
    found = client.filter_adversarial([picture], filter_all=True, second_look=True)
    assert found.dictionary in {"sae", "sae-group", "sae-pair"}
    (image,) = found.images
    assert image.filtered
    assert abs(float(image.after @ image.after) - 1) < 1e-3


def test_generation_is_steered(client: Client, bundles: tuple[Bundle, Bundle]) -> None:
    firing = int(bundles[0].modality().firing_rate_image.argmax())
    (image,) = client.generate("a red heart", seeds=1, edits=[SteeringEdit(firing, quantile=0.9)]).images
    assert image.ok
    assert image.delta > 0
