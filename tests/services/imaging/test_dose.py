"""Doses and attributes: what they are, where they end, and what a bundle keeps of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.bundle.load import Bundle, refresh_manifest
from services.errors import BundleError, InvalidInput, SteeringUnsupported, UnknownAttribute
from services.imaging.dose import MAX_GAIN, MAX_OVERSHOOT, whitening_of
from services.imaging.edits import AttributeEdit, Edit, FromReference, Scale, SetQuantile, Steering
from services.imaging.steering import dosed, edited, steer, turned
from services.modality.modalities import Modality
from services.modality.tables import Label
from tests.services.imaging.test_steering import REFERENCE, ROWS, SPACE, D, Z, embedding, encode_reference
from tests.support.tiny_attributes import add_attributes, make_attributes
from tests.support.tiny_bundle import make_tiny_bundle

KNOWN = make_attributes("f" * 64, D, dictionary="tiny")
DOSED = replace(SPACE, attributes=KNOWN)
IMAGE = Modality.IMAGE
NORM = 7.5


def test_whitened_embeddings_have_unit_length_on_average_and_no_preferred_direction() -> None:
    e = np.random.default_rng(0).standard_normal((20_000, 8)) * np.geomspace(0.1, 10, 8)
    white = e @ whitening_of(e.astype(np.float32), shrink=1e-9)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(8) / 8, atol=1e-3)


def test_shrinkage_keeps_noise_from_being_blown_up() -> None:
    e = np.random.default_rng(0).standard_normal((2_000, 8))
    e[:, 7] *= 1e-6
    white = e @ whitening_of(e.astype(np.float32))
    assert np.square(white[:, 7]).mean() < 1e-6


@pytest.mark.parametrize("dose", [0.02, 0.1, 0.2])
def test_a_change_is_rescaled_to_the_dose_that_is_asked(dose: float) -> None:
    e = embedding()
    steered = steer(e, Z, Steering((Edit(Label.IMAGE, Scale(3.0)),), dose=dose), DOSED, encode_reference)
    moved = e.norm * (steered.unit.astype(np.float64) - e.unit)
    assert np.linalg.norm(moved @ KNOWN.whitening) == pytest.approx(dose, rel=1e-4)
    assert steered.dose == pytest.approx(dose, rel=1e-4)


def test_edits_of_any_label_come_to_the_same_dose() -> None:
    doses = [
        steer(embedding(), Z, Steering((Edit(label, Scale(2.0)),), dose=0.1), DOSED, encode_reference).dose
        for label in (Label.IMAGE, Label.TEXT, Label.CROSS)
    ]
    np.testing.assert_allclose(doses, 0.1, rtol=1e-4)


def test_a_change_towards_a_reference_ends_a_little_past_it() -> None:
    e = embedding()
    edit = Edit((0, 1, 2), FromReference(text="x"))
    whole = steer(e, Z, Steering((edit,)), DOSED, encode_reference)
    far = steer(e, Z, Steering((edit,), dose=50.0), DOSED, encode_reference)
    change = (REFERENCE - Z)[[0, 1, 2]].astype(np.float64) @ ROWS[[0, 1, 2]]
    end = e.unit + MAX_OVERSHOOT * change
    np.testing.assert_allclose(far.unit, end / np.linalg.norm(end), atol=1e-6)
    assert whole.dose is not None
    assert far.dose is not None
    assert whole.dose < far.dose < 50.0


def test_a_dose_out_of_reach_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        steer(
            embedding(), Z, Steering((Edit(Label.IMAGE, Scale(2.0)),), dose=1000.0), DOSED, encode_reference
        )
    assert (caught.value.reason, caught.value.violations[0].path) == ("DOSE_OUT_OF_REACH", "dose")


def test_the_first_crossing_is_taken_where_the_dose_falls_again() -> None:
    unit, direction = np.array([1.0, 0.0]), np.array([-1.0, 0.5])
    # Past right angles the measure of the first component alone still grows; of the second it falls.
    found = dosed(unit, direction, 0.3, lambda change: abs(float(change[1])), 100.0)
    moved = unit + found
    assert moved[1] / np.linalg.norm(moved) == pytest.approx(0.3, rel=1e-6)
    assert moved[0] > 0


def test_a_dose_needs_a_bundle_that_knows_doses_and_no_other_size() -> None:
    edit = (Edit(Label.IMAGE, Scale(2.0)),)
    with pytest.raises(SteeringUnsupported):
        steer(embedding(), Z, Steering(edit, dose=0.1), SPACE, encode_reference)
    with pytest.raises(InvalidInput) as caught:
        steer(embedding(), Z, Steering(edit, dose=0.1, delta=0.1), DOSED, encode_reference)
    assert caught.value.violations[0].path == "dose"
    assert steer(embedding(), Z, Steering(edit), SPACE, encode_reference).dose is None


def test_a_quantile_is_lengthened_to_the_unit_and_no_more_than_six_times() -> None:
    z = np.zeros_like(Z)
    plain = edited(z, (Edit((1,), SetQuantile(0.5)),), SPACE, IMAGE, encode_reference, NORM)
    asked = KNOWN.dose(NORM * plain.astype(np.float64) @ ROWS)
    for wanted, factor in ((2.0 * asked, 2.0), (100.0 * asked, MAX_GAIN), (0.1 * asked, 1.0)):
        known = replace(KNOWN, config=replace(KNOWN.config, unit=wanted))
        space = replace(SPACE, attributes=known)
        got = edited(z, (Edit((1,), SetQuantile(0.5)),), space, IMAGE, encode_reference, NORM)
        np.testing.assert_allclose(got, factor * plain, rtol=1e-5)
        half = edited(z, (Edit((1,), SetQuantile(0.5), 0.5),), space, IMAGE, encode_reference, NORM)
        np.testing.assert_allclose(half, factor * plain / 2, rtol=1e-5)


@pytest.mark.parametrize("operation", [Scale(2.0), FromReference(text="x")])
def test_other_operations_reach_their_target_and_stop(operation: Scale | FromReference) -> None:
    edit = (Edit((0, 2), operation),)
    np.testing.assert_array_equal(
        edited(Z, edit, DOSED, IMAGE, encode_reference, NORM),
        edited(Z, edit, SPACE, IMAGE, encode_reference, NORM),
    )


def test_an_attribute_moves_by_its_dose_and_its_strength() -> None:
    for strength in (0.5, 1.0, 2.0):
        z = turned(Z, (AttributeEdit("blue", strength),), DOSED, IMAGE, NORM)
        change = (z - Z).astype(np.float64)
        assert np.flatnonzero(change).tolist() == [1, 2]
        assert KNOWN.dose(NORM * change @ ROWS) == pytest.approx(0.3 * strength, rel=1e-4)


def test_an_attribute_leaves_no_activation_below_zero() -> None:
    z = turned(Z, (AttributeEdit("smile", 4.0),), DOSED, IMAGE, NORM)
    assert z[3] == 0.0
    assert z[0] > Z[0]


def test_strength_zero_of_an_attribute_is_the_very_array() -> None:
    e = embedding()
    for steering in (
        Steering(attributes=(AttributeEdit("blue", 0.0),)),
        Steering(attributes=(AttributeEdit("blue"),), dose=0.0),
    ):
        steered = steer(e, Z, steering, DOSED, encode_reference)
        assert steered.unit is e.unit
        assert (steered.delta, steered.dose) == (0.0, 0.0)


def test_attributes_and_edits_add_up() -> None:
    steering = Steering((Edit((1,), Scale(2.0)),), attributes=(AttributeEdit("blue"), AttributeEdit("smile")))
    steered = steer(embedding(), Z, steering, DOSED, encode_reference)
    wanted = turned(
        edited(Z, steering.edits, DOSED, IMAGE, encode_reference, NORM),
        steering.attributes,
        DOSED,
        IMAGE,
        NORM,
    )
    np.testing.assert_array_equal(steered.z_steered, wanted)


def test_what_cannot_be_turned_is_refused_by_its_path() -> None:
    def paths(*several: AttributeEdit) -> list[str]:
        with pytest.raises(InvalidInput) as caught:
            turned(Z, several, DOSED, IMAGE)
        return [violation.path for violation in caught.value.violations]

    assert paths(AttributeEdit("blue"), AttributeEdit("green")) == ["attributes[1].name"]
    assert paths(AttributeEdit("blue", 5.0)) == ["attributes[0].strength"]
    with pytest.raises(UnknownAttribute):
        turned(Z, (AttributeEdit("blue"),), replace(DOSED, name="other"), IMAGE)
    with pytest.raises(SteeringUnsupported):
        turned(Z, (AttributeEdit("blue"),), SPACE, IMAGE)


def test_a_bundle_keeps_attributes_and_loads_without_them(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    assert bundle.attributes() is None
    written = add_attributes(bundle)
    assert written.id != bundle.id
    known = written.attributes()
    assert known is not None
    made = make_attributes(bundle.manifest.clip.fingerprint, bundle.clip_config.embed_dim)
    assert known.config == made.config
    np.testing.assert_array_equal(known.whitening, made.whitening)
    for name, attribute in made.attributes.items():
        np.testing.assert_array_equal(known.attributes[name].ids, attribute.ids)
        np.testing.assert_array_equal(known.attributes[name].values, attribute.values)


def test_attributes_of_another_bundle_are_refused(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    fingerprint, d = bundle.manifest.clip.fingerprint, bundle.clip_config.embed_dim
    make_attributes("0" * 64, d).write(bundle.path / "attributes")
    with pytest.raises(BundleError, match="attributes was calibrated on other towers"):
        refresh_manifest(bundle.path)
    for wrong in (make_attributes(fingerprint, d + 1), make_attributes(fingerprint, d, dictionary="none")):
        wrong.write(bundle.path / "attributes")
        refresh_manifest(bundle.path)
        with pytest.raises(BundleError, match="attributes: not of"):
            Bundle.load(bundle.path).attributes()
    (bundle.path / "attributes/attributes.safetensors").write_bytes(b"no")
    refresh_manifest(bundle.path)
    with pytest.raises(BundleError):
        Bundle.load(bundle.path).attributes()
