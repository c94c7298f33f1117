"""Bundles looked into: verified, inspected, compared, and given a dictionary; by services and by the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import Result
from typer.testing import CliRunner

from deployments.bundle_command import commands as group
from services.bundle.checks import run_checks
from services.bundle.edit import add_dictionary
from services.bundle.inspection import diff_bundles, inspect_bundle, match_rows
from services.bundle.load import Bundle, refresh_manifest
from services.dictionaries import SAE, Modality, SAEPair
from services.encoding.clip import build_clip
from services.errors import ManifestError
from tests.support.tiny_pipeline import add_tiny_pipeline

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(group, [str(argument) for argument in arguments])

    return invoke


def weights_of(path: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(str(path / "dictionaries" / f"{name}.safetensors"))


def rewrite(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a dictionary's weights and vouch for them anew, as somebody who does not know better would."""
    state = weights_of(path, name)
    change(state)
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in state.items()},
        str(path / "dictionaries" / f"{name}.safetensors"),
    )
    refresh_manifest(path)


def test_a_whole_bundle_passes_every_check(copied: Path, run: Run) -> None:
    assert [(check.name, check.ok) for check in run_checks(copied)] == [
        (name, True) for name in ("manifest", "files", "towers", "weights", "dictionaries", "tables", "probe")
    ]
    done = run("verify", copied)
    assert done.exit_code == 0
    assert done.output.count("ok") >= 7


def nan(path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["decoder"][3, 1] = float("nan")

    rewrite(path, "sae", change)


def short(path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["decoder"] = state["decoder"][:-1]

    rewrite(path, "sae", change)


def flipped(path: Path) -> None:
    file = path / "dictionaries" / "sae.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def pickled(path: Path) -> None:
    (path / "clip" / "model.pt").write_bytes(b"\x80\x04N.")


def headless(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "check", "found"),
    [
        (nan, "weights", "decoder has values that are not finite"),
        (short, "dictionaries", "does not fit its config"),
        (flipped, "files", "dictionaries/sae.safetensors: wrong SHA-256"),
        (pickled, "files", "weights must be safetensors"),
        (headless, "manifest", "no manifest.json"),
    ],
)
def test_each_kind_of_damage_is_found_and_named(
    damage: Callable[[Path], None], check: str, found: str, copied: Path, run: Run
) -> None:
    damage(copied)
    failed = [c for c in run_checks(copied) if not c.ok]
    assert check in [c.name for c in failed]
    assert found in next(c.found for c in failed if c.name == check)
    done = run("verify", copied, "--json")
    assert done.exit_code == 1
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    assert check in [c["name"] for c in answer["checks"] if not c["ok"]]


def test_a_bundle_is_described_in_full(tiny: Bundle, run: Run) -> None:
    found = inspect_bundle(tiny)
    assert found["id"] == tiny.id
    assert found["bytes"] == sum(entry.bytes for entry in tiny.manifest.files.values())
    by_name = {d["name"]: d for d in found["dictionaries"]}
    assert set(by_name) == set(tiny.dictionary_names)
    assert sum(by_name["sae"]["labels"].values()) == by_name["sae"]["n_features"]
    assert json.loads(run("inspect", tiny.path, "--json").stdout) == json.loads(json.dumps(found))
    shown = run("inspect", tiny.path).output
    for part in (tiny.id, "sae-group", "Apache-2.0", "32 x 32 pixels"):
        assert part in shown
    missing = run("inspect", tiny.path / "clip")
    assert (missing.exit_code, missing.output.count("\n")) == (3, 1)


def test_a_bundle_does_not_differ_from_itself(tiny: Bundle, run: Run) -> None:
    found = diff_bundles(tiny, tiny)
    assert found["same"] and found["same_towers"]
    assert found["manifest"] == {} and found["files"] == {"added": [], "removed": [], "changed": {}}
    assert found["dictionaries"]["sae"]["features"]["matched"] == 64
    assert "are the same" in run("diff", tiny.path, tiny.path).output


def test_features_are_found_again_in_another_order(tiny: Bundle, copied: Path, run: Run) -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))

    def change(state: dict[str, torch.Tensor]) -> None:
        state["decoder"] = state["decoder"][order]
        # One feature that is no longer there.
        state["decoder"][0] = -state["decoder"][1]

    rewrite(copied, "sae", change)
    found = diff_bundles(tiny, Bundle.load(copied))["dictionaries"]["sae"]
    assert found["status"] == "changed"
    assert (found["features"]["compared"], found["features"]["matched"]) == (64, 63)
    # The table was not put in that order, so each matched feature that moved to another label counts.
    labels = tiny.modality("sae").label
    moved = sum(labels[order[j]] != labels[j] for j in range(1, 64))
    assert (found["labels"]["changed"], found["labels"]["of"]) == (moved, 63)
    shown = run("diff", tiny.path, copied).output
    assert "dictionaries/sae.safetensors" in shown and "63 of 64" in shown


def replaced(path: Path, name: str, other: str) -> None:
    """Put another dictionary of the bundle under a name, as a later build with another recipe would."""
    folder = path / "dictionaries"
    for suffix in (".json", ".safetensors"):
        if (folder / f"{other}{suffix}").exists():
            shutil.copyfile(folder / f"{other}{suffix}", folder / f"{name}{suffix}")
        else:
            (folder / f"{name}{suffix}").unlink()
    modality = path / "modality"
    shutil.copyfile(modality / f"{other}.parquet", modality / f"{name}.parquet")
    refresh_manifest(path)


@pytest.mark.parametrize("other", ["sae-pair", "ncl", "neurons"])
def test_dictionaries_of_two_kinds_are_compared(tiny: Bundle, copied: Path, run: Run, other: str) -> None:
    if other == "neurons":
        # It has no cards for 64 features.
        (copied / "cards" / "sae.parquet").unlink()
    replaced(copied, "sae", other)
    changed = Bundle.load(copied)
    for a, b in ((tiny, changed), (changed, tiny)):
        found = diff_bundles(a, b)["dictionaries"]["sae"]
        kinds = [bundle.manifest.dictionaries["sae"].kind for bundle in (a, b)]
        assert found["sizes"]["kind"] == kinds
        assert ("features" in found) == (other != "neurons")
    done = run("diff", tiny.path, copied)
    assert done.exit_code == 0, done.output
    shown = json.loads(run("diff", tiny.path, copied, "--json").stdout)
    assert shown["dictionaries"]["sae"]["sizes"]["kind"] == ["sae", other]


def test_a_shared_dictionary_is_found_again_in_a_pair_of_the_same(tiny: Bundle, copied: Path) -> None:
    folder = copied / "dictionaries"
    sae = tiny.dictionary("sae")
    assert isinstance(sae, SAE)
    pair = SAEPair.matched(sae, sae, np.arange(sae.n_features))
    pair.save(folder, "sae", tower_fingerprint=tiny.manifest.clip.fingerprint)
    refresh_manifest(copied)
    found = diff_bundles(tiny, Bundle.load(copied))["dictionaries"]["sae"]
    assert (found["features"]["compared"], found["features"]["matched"]) == (64, 64)
    assert found["features"]["median_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["labels"]["changed"] == 0


def test_directions_of_other_towers_are_not_compared(tiny: Bundle, tmp_path: Path) -> None:
    from tests.support.tiny_bundle import make_tiny_bundle

    other = make_tiny_bundle(tmp_path / "other", seed=1)
    found = diff_bundles(tiny, other)
    assert not found["same_towers"]
    assert found["dictionaries"]["sae"]["features"] == "not comparable: other towers"


def test_rows_match_only_where_both_agree() -> None:
    a = np.eye(4, dtype=np.float32)
    b = np.stack([a[2], a[0], a[0] * 0.8 + a[1] * 0.6]).astype(np.float32)
    order, cosine = match_rows(a, b)
    assert order[[0, 2]].tolist() == [1, 0]
    # Row 2 of b is nearest to row 0 of a, which has a nearer one; row 3 has none.
    np.testing.assert_allclose(cosine, [1, -1, 1, -1], atol=1e-6)


def test_a_dictionary_goes_out_of_one_bundle_and_into_another(
    tiny: Bundle, copied: Path, tmp_path: Path, run: Run
) -> None:
    assert run("export-dictionary", tiny.path, "sae", tmp_path / "out").exit_code == 0
    done = run("import-dictionary", copied, "guest", tmp_path / "out")
    assert done.exit_code == 0, done.output
    made = Bundle.load(copied)
    assert made.id != tiny.id and "guest" in made.dictionary_names
    e = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    for modality in Modality:
        torch.testing.assert_close(
            made.dictionary("guest").encode(e, modality),
            tiny.dictionary("sae").encode(e, modality),
            atol=1e-6,
            rtol=0,
        )
    again = run("import-dictionary", copied, "guest", tmp_path / "out")
    assert again.exit_code == 3 and "is there already" in again.output
    refused = run("export-dictionary", tiny.path, "ncl", tmp_path / "ncl")
    assert refused.exit_code == 3 and "no form" in refused.output


def test_a_pipeline_goes_out_as_a_folder_and_only_where_there_is_one(
    tiny: Bundle, copied: Path, tmp_path: Path, run: Run
) -> None:
    refused = run("export-pipeline", tiny.path, tmp_path / "none")
    assert refused.exit_code == 3 and "no text-to-image pipeline" in refused.output
    add_tiny_pipeline(Bundle.load(copied))
    done = run("export-pipeline", copied, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "image_encoder" / "model.safetensors").is_file()


def test_a_dictionary_that_does_not_fit_leaves_the_bundle_as_it_was(copied: Path) -> None:
    before = Bundle.load(copied).id
    for name, dictionary, what in (
        ("wide", SAE(8, 16, 2), "8 dimensions"),
        ("../out", SAE(16, 16, 2), "is no name"),
    ):
        with pytest.raises(ManifestError, match=what):
            add_dictionary(copied, name, dictionary, {})
    assert Bundle.load(copied).id == before


def test_a_probe_tells_how_much_a_dictionary_keeps(tiny: Bundle, copied: Path) -> None:
    from services.bundle.load import CLIP_CONFIG, SELFCHECK
    from services.bundle.selfcheck import write_selfcheck
    from training.build.selfcheck import probe_of_folder

    write_selfcheck(copied / SELFCHECK, probe_of_folder((copied / CLIP_CONFIG).parent))
    refresh_manifest(copied)
    config = tiny.clip_config
    assert build_clip(config, tiny.clip_weights) is not None
    made = shutil.copytree(copied, copied.parent / "second")
    identity = SAE(16, 32, 32, "jump-relu")
    with torch.no_grad():
        eye = torch.eye(16)
        identity.encoder.copy_(torch.cat([eye, -eye], dim=1))
        identity.decoder.copy_(torch.cat([eye, -eye]))
    _, kept = add_dictionary(Path(made), "identity", identity, {})
    assert kept == pytest.approx(1, abs=1e-5)
    assert next(check for check in run_checks(Path(made)) if check.name == "probe").found.startswith("tokens")
