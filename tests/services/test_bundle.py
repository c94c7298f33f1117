from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from services.bundle.load import CLIP_CONFIG, CLIP_WEIGHTS, Bundle, refresh_manifest, write_manifest
from services.bundle.manifest import MANIFEST_NAME, Licence, parse_manifest
from services.bundle.verification import UNSAFE_SUFFIXES
from services.dictionaries import Modality
from services.encoding.clip import tower_fingerprint
from services.errors import (
    BundleError,
    BundleFileError,
    ManifestError,
    TowerMismatch,
    UnknownDictionary,
    UnknownFeature,
    UnsafeWeights,
)
from services.modality.tables import MODALITY_COLUMNS, Cards, ModalityTable, read_thumbnails
from tests.support.tiny_bias import with_bias
from tests.support.tiny_bundle import CAPTIONS, EMBED_DIM, N_FEATURES, make_tiny_bundle


def edit(bundle: Path, change) -> None:
    document = json.loads((bundle / MANIFEST_NAME).read_text())
    change(document)
    (bundle / MANIFEST_NAME).write_text(json.dumps(document))


def test_a_valid_bundle_loads_and_says_what_it_is(tiny):
    assert tiny.id == f"tiny@{tiny.sha256[:12]}"
    assert tiny.dictionary_names == ("ncl", "neurons", "sae", "sae-group", "sae-pair")
    description = tiny.describe()
    assert description["towers"]["embed_dim"] == EMBED_DIM
    assert str(tiny.path) not in json.dumps(description)
    assert [sample.caption for sample in tiny.manifest.samples] == list(CAPTIONS)


def test_the_id_does_not_depend_on_how_the_manifest_is_laid_out(tiny, copied):
    edit(copied, lambda document: None)
    assert Bundle.load(copied).id == tiny.id


def test_the_same_seed_makes_the_same_bundle(tiny, tmp_path):
    assert make_tiny_bundle(tmp_path / "again").manifest.clip == tiny.manifest.clip


def test_every_dictionary_loads_and_encodes(tiny):
    e = torch.nn.functional.normalize(torch.randn(3, EMBED_DIM), dim=-1)
    for name in tiny.dictionary_names:
        dictionary = tiny.dictionary(name)
        assert dictionary.name == name
        assert dictionary.encode(e, Modality.IMAGE).shape == (3, dictionary.n_features)


def test_an_empty_name_means_the_default_dictionary(tiny):
    assert tiny.dictionary().name == "sae"
    assert len(tiny.modality()) == N_FEATURES


def test_an_unknown_dictionary_is_refused_with_the_known_ones(tiny):
    with pytest.raises(UnknownDictionary, match="neurons") as caught:
        tiny.dictionary("nope")
    assert caught.value.violations[0][0] == "dictionary"


def test_cards_give_the_strongest_samples_first_with_thumbnails(tiny):
    images = tiny.cards("sae").top(3, "image", limit=10)
    assert [card.rank for card in images] == [0, 1]
    assert images[0].activation >= images[1].activation
    assert images[0].thumbnail[8:12] == b"WEBP"
    assert tiny.cards("sae").top(3, "text", limit=1)[0].thumbnail == b""


def test_a_modality_table_survives_the_disk(tiny, tmp_path):
    table = tiny.modality("sae")
    table.write(tmp_path / "table.parquet")
    again = ModalityTable.read(tmp_path / "table.parquet")
    for column in MODALITY_COLUMNS:
        np.testing.assert_array_equal(getattr(again, column), getattr(table, column))
    with pytest.raises(UnknownFeature):
        table.row(N_FEATURES)


def test_a_table_of_before_the_figures_of_names_is_read_without_them(tiny, tmp_path):
    path = tmp_path / "table.parquet"
    table = pq.read_table(tiny.path / "modality/sae.parquet")
    pq.write_table(table.drop(["name_auc_low", "name_auc_high", "name_count"]), path)
    again = ModalityTable.read(path)
    assert again.name.tolist() == tiny.modality("sae").name.tolist()
    assert np.isnan(again.name_auc_low).all()
    assert (again.name_count == 0).all()


def test_a_table_with_nulls_or_other_columns_is_refused(tiny, tmp_path):
    path = tmp_path / "table.parquet"
    good = pq.read_table(tiny.path / "modality/sae.parquet")
    nulls = pa.array([None] * good.num_rows, pa.string())
    for bad in (good.set_column(good.column_names.index("name"), "name", nulls), good.drop(["mds_energy"])):
        pq.write_table(bad, path)
        with pytest.raises(BundleFileError):
            ModalityTable.read(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(BundleFileError):
        ModalityTable.read(path)


# What can be wrong on disk.


def test_a_changed_byte_is_a_wrong_hash(copied):
    file = copied / "samples/0.png"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleFileError, match=r"samples/0\.png: wrong SHA-256"):
        Bundle.load(copied)


def test_a_changed_size_is_seen_even_without_hashing(copied):
    with (copied / "samples/0.png").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleFileError, match="bytes, the manifest says"):
        Bundle.load(copied, verify=False)


def test_a_missing_and_an_extra_file_are_both_named(copied):
    (copied / "samples/0.png").unlink()
    (copied / "notes.txt").write_text("hello")
    with pytest.raises(BundleFileError) as caught:
        Bundle.load(copied)
    assert {violation.path: violation.description for violation in caught.value.violations} == {
        "samples/0.png": "missing",
        "notes.txt": "not in the manifest",
    }


@pytest.mark.parametrize("suffix", sorted(UNSAFE_SUFFIXES))
def test_weights_that_could_run_code_are_refused(copied, suffix):
    (copied / f"clip/model{suffix.upper()}").write_bytes(b"x")
    with pytest.raises(UnsafeWeights):
        Bundle.load(copied)


def test_a_manifest_that_names_other_weights_is_refused(copied):
    shutil.move(copied / CLIP_WEIGHTS, copied / "clip/model.weights")

    def change(document):
        document["clip"]["weights"] = "clip/model.weights"
        document["files"]["clip/model.weights"] = document["files"].pop(CLIP_WEIGHTS)

    edit(copied, change)
    with pytest.raises(UnsafeWeights, match=r"clip\.weights"):
        Bundle.load(copied)


def test_a_link_out_of_the_bundle_is_refused(copied, tmp_path):
    (tmp_path / "secret").write_text("x")
    (copied / "secret").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleFileError):
        Bundle.load(copied)


def test_a_dictionary_of_another_tower_is_refused(copied):
    def change(document):
        document["dictionaries"]["sae"]["tower_fingerprint"] = "0" * 64

    edit(copied, change)
    with pytest.raises(TowerMismatch, match="sae"):
        Bundle.load(copied, verify=False)


def test_a_dictionary_saved_for_another_tower_cannot_enter_a_manifest(tiny, copied):
    tiny.dictionary("sae").save(copied / "dictionaries", "stranger", tower_fingerprint="f" * 64)
    with pytest.raises(TowerMismatch, match="stranger"):
        write_manifest(
            copied, name="x", description="", licences=[Licence("MIT", "all")], default_dictionary="sae"
        )


def test_other_towers_behind_a_right_hash_are_refused(copied):
    edit(copied, lambda document: document["clip"].update(fingerprint="0" * 64))
    with pytest.raises(TowerMismatch):
        Bundle.load(copied)


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        # 2 GB and 1.4 GB of texts, and 20 million rows, in files of kilobytes.
        (["x" * 1_000_000], 1_000, "its texts decode to 2,000,000,000 bytes"),
        (["x" * 1_000, "y" * 999], 700_000, "its texts decode to"),
        (["x"], 20_000_000, "rows decode to more than"),
    ],
)
def test_a_small_table_that_decodes_to_gigabytes_is_refused_before_it_is_made(tmp_path, text, rows, message):
    path = tmp_path / "images.parquet"
    # As dictionary arrays, so that the test does not make them either.
    places = pa.array(np.zeros(rows, np.int8))
    columns = [
        pa.DictionaryArray.from_arrays(places, pa.array(text, kind)) for kind in (pa.string(), pa.binary())
    ]
    pq.write_table(pa.table(dict(zip(("sample", "webp"), columns, strict=True))), path, compression="zstd")
    assert path.stat().st_size < 200_000
    before = pa.total_allocated_bytes()
    with pytest.raises(BundleFileError, match=message):
        read_thumbnails(path)
    assert pa.total_allocated_bytes() - before < 50_000_000


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a@b", ".hidden", "a\nb", "x" * 65, "a\x1b[31m"])
def test_a_name_that_would_lead_or_print_elsewhere_is_refused(copied, name):
    def rename(document):
        document["name"] = name

    edit(copied, rename)
    with pytest.raises(ManifestError, match="name: must be 1 to 64"):
        Bundle.load(copied)


def test_a_dictionary_of_another_width_than_the_towers_is_refused_before_it_is_made(copied):
    path = copied / "dictionaries/neurons.json"
    document = json.loads(path.read_text())
    # The identity of a million dimensions takes 4 TB.
    document |= {"embed_dim": 10**6, "n_features": 10**6, "config": {"embed_dim": 10**6}}
    path.write_text(json.dumps(document))
    for suffix in ("modality", "cards"):
        (copied / suffix / "neurons.parquet").unlink()
    refused = pytest.raises(
        ManifestError, match="dictionary neurons takes 1000000 dimensions, the towers give 16"
    )
    with refused:
        refresh_manifest(copied)


def test_the_fingerprint_ignores_metadata_and_order_but_not_weights_or_preprocessing(copied):
    config, weights = copied / CLIP_CONFIG, copied / CLIP_WEIGHTS
    before = tower_fingerprint(config, weights)
    state = safetensors.torch.load_file(str(weights))
    reordered = dict(reversed(state.items()))
    safetensors.torch.save_file(reordered, str(weights), metadata={"made": "today"})
    assert tower_fingerprint(config, weights) == before
    state["logit_scale"] = state["logit_scale"] + 1
    safetensors.torch.save_file(state, str(weights))
    changed = tower_fingerprint(config, weights)
    assert changed != before
    document = json.loads(config.read_text())
    document["preprocess_cfg"]["mean"][0] = 0.5
    config.write_text(json.dumps(document))
    assert tower_fingerprint(config, weights) != changed


# The manifest is parsed strictly.


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.pop("clip"), "clip"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["clip"].pop("weights"), "clip.weights"),
        (lambda d: d["dictionaries"]["sae"].update(n_features="64"), "dictionaries.sae.n_features"),
        (lambda d: d["dictionaries"]["sae"].update(n_features=True), "dictionaries.sae.n_features"),
        (lambda d: d["licences"][0].update(url="x"), "licences[0].url"),
        (lambda d: d["files"].update(x={"sha256": "0"}), "files.x.bytes"),
        (lambda d: d.update(samples={}), "samples"),
        (lambda d: d["samples"][0].update(path="../../etc/passwd"), "samples[0].path"),
        (lambda d: d.update(default_dictionary="nope"), "default_dictionary"),
        (
            lambda d: d["dictionaries"]["sae"].update(config="dictionaries/ncl.json"),
            "dictionaries.sae.config",
        ),
        (lambda d: d["modality"].update(nope="modality/sae.parquet"), "modality.nope"),
        (lambda d: d.update(schema_version=2), "schema_version"),
    ],
)
def test_a_wrong_manifest_is_refused_by_key(tiny, change, key):
    document = json.loads((tiny.path / MANIFEST_NAME).read_text())
    change(document)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(document))
    assert key in [path for path, *_ in caught.value.violations]


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_what_is_not_a_manifest_is_refused(text):
    with pytest.raises(ManifestError):
        parse_manifest(text)


def test_a_folder_without_manifest_is_refused_without_naming_the_whole_path(tmp_path):
    with pytest.raises(BundleError) as caught:
        Bundle.load(tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_a_feature_that_fires_on_one_side_only_has_no_examples_of_the_other(tiny: Bundle) -> None:
    cards = tiny.cards("sae")
    one_sided = Cards(cards.table.filter(pc.equal(cards.table["modality"], "image")), cards.thumbnails)
    feature = one_sided.table["feature"][0].as_py()
    assert one_sided.top(feature, "image", 3)
    assert one_sided.top(feature, "text", 3) == []


def test_a_calibration_joins_a_finished_bundle_and_leaves_the_rest_as_it_is(tiny, tmp_path):
    calibrated = with_bias(tiny, tmp_path / "tiny")
    entry = calibrated.manifest.bias
    assert entry is not None and entry.tower_fingerprint == tiny.manifest.clip.fingerprint
    assert tiny.manifest.bias is None
    assert calibrated.id != tiny.id
    for field in (
        "name",
        "licences",
        "provenance",
        "metrics",
        "training_commands",
        "dictionaries",
        "samples",
    ):
        assert getattr(calibrated.manifest, field) == getattr(tiny.manifest, field)
    assert set(calibrated.manifest.files) - set(tiny.manifest.files) == {entry.config, entry.weights}


def test_a_calibration_of_other_towers_is_refused(tiny, tmp_path):
    calibrated = with_bias(tiny, tmp_path / "tiny")
    config = calibrated.path / calibrated.manifest.bias.config
    config.write_text(config.read_text().replace(tiny.manifest.clip.fingerprint, "0" * 64))
    with pytest.raises(TowerMismatch):
        refresh_manifest(calibrated.path)
