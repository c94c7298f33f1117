"""The steering maths against what the formulas say, on a dictionary small enough to know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.errors import BundleFileError, InvalidInput, SteeringUnsupported, UnknownFeature
from services.imaging.edits import Edit, FromReference, Scale, SetQuantile, Steering
from services.imaging.prompt_path import hidden_change, steered_hidden_states
from services.imaging.statistics import ENOUGH, PROBABILITIES, ActivationStatistics
from services.imaging.steering import Embedding, FeatureSpace, edited, rescaled, steer
from services.modality.modalities import Modality
from services.modality.tables import Label, ModalityTable

N, D = 12, 6
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((N, D)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
Z = np.maximum(RNG.standard_normal(N), 0).astype(np.float32)
REFERENCE = np.maximum(RNG.standard_normal(N), 0).astype(np.float32)
LABELS = np.array(["IMAGE", "TEXT", "CROSS"])[np.arange(N) % 3]


def make_statistics() -> ActivationStatistics:
    z_image, z_text = np.zeros((200, N), np.float32), np.zeros((200, N), np.float32)
    z_image[:, :10] = RNG.uniform(1, 2, (200, 10))
    z_text[:, 1:4] = RNG.uniform(3, 4, (200, 3))
    z_text[:3, 0] = 9.0
    return ActivationStatistics.measure(z_image, z_text)


STATISTICS = make_statistics()
SPACE = FeatureSpace(
    "tiny", N, False, lambda modality: ROWS, ModalityTable.from_columns({"label": LABELS}, N), STATISTICS
)


def encode_reference(reference: FromReference) -> NDArray[np.float32]:
    return REFERENCE


def embedding(seed: int = 0, norm: float = 7.5) -> Embedding:
    e = np.random.default_rng(seed).standard_normal(D)
    return Embedding((e / np.linalg.norm(e)).astype(np.float32), norm, Modality.IMAGE)


def apply(
    *edits: Edit, modality: Modality = Modality.IMAGE, space: FeatureSpace = SPACE
) -> NDArray[np.float32]:
    return edited(Z, edits, space, modality, encode_reference)


def test_scale_multiplies_and_leaves_the_others_alone() -> None:
    z = apply(Edit((1, 4), Scale(2.0)))
    np.testing.assert_allclose(z[[1, 4]], 2 * Z[[1, 4]])
    assert np.array_equal(np.delete(z, [1, 4]), np.delete(Z, [1, 4]))


def test_strength_goes_part_of_the_way_and_past_the_target() -> None:
    for strength in (0.0, 0.3, 1.0, 2.0):
        z = apply(Edit((0, 2), FromReference(text="x"), strength))
        wanted = (1 - strength) * Z[[0, 2]] + strength * REFERENCE[[0, 2]]
        np.testing.assert_allclose(z[[0, 2]], np.maximum(wanted, 0), rtol=1e-6)


def test_a_label_stands_for_its_features() -> None:
    z = apply(Edit(Label.TEXT, Scale(0.0)))
    assert not z[LABELS == "TEXT"].any()
    assert np.array_equal(z[LABELS != "TEXT"], Z[LABELS != "TEXT"])


def test_edits_apply_in_order() -> None:
    set_then_double = apply(Edit((3,), SetQuantile(1.0)), Edit((3,), Scale(2.0)))
    double_then_set = apply(Edit((3,), Scale(2.0)), Edit((3,), SetQuantile(1.0)))
    np.testing.assert_allclose(set_then_double[3], 2 * double_then_set[3])


def test_activations_stay_at_or_above_zero_unless_they_are_signed() -> None:
    active = int(np.argmax(Z))
    assert apply(Edit((active,), Scale(-3.0)))[active] == 0
    assert apply(Edit((active,), Scale(-3.0)), space=replace(SPACE, signed=True))[active] == -3 * Z[active]


def test_a_quantile_is_of_the_modality_where_the_feature_fires() -> None:
    statistics = STATISTICS
    one = np.array([1])
    assert 1 <= statistics.quantile(one, 0.5, Modality.IMAGE)[0] <= 2
    assert 3 <= statistics.quantile(one, 0.5, Modality.TEXT)[0] <= 4
    # Never in texts, and three times only: too few to say what is usual.
    assert 1 <= statistics.quantile(np.array([8]), 0.5, Modality.TEXT)[0] <= 2
    assert statistics.count_text[0] == 3 < ENOUGH
    assert 1 <= statistics.quantile(np.array([0]), 0.5, Modality.TEXT)[0] <= 2
    low, high = (statistics.quantile(one, q, Modality.IMAGE)[0] for q in (0.0, 1.0))
    assert 1 <= low < high <= 2


def test_a_feature_that_never_fired_has_no_quantile_and_a_label_passes_it_over() -> None:
    with pytest.raises(InvalidInput, match="never active") as caught:
        apply(Edit((1,), Scale(1.0)), Edit((11,), SetQuantile(0.5)))
    assert caught.value.violations[0][0] == "edits[1].ids"
    dead = (LABELS == "CROSS") & (np.arange(N) >= 10)
    assert dead.any()
    z = apply(Edit(Label.CROSS, SetQuantile(0.5)))
    assert np.array_equal(z[dead], Z[dead])
    assert (z[(LABELS == "CROSS") & ~dead] >= 1).all()


def test_statistics_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "steering" / "tiny.safetensors"
    STATISTICS.write(path, dictionary="tiny", tower_fingerprint="f" * 64)
    read = ActivationStatistics.read(path)
    assert read.tower_fingerprint == "f" * 64
    assert np.array_equal(read.count_image, STATISTICS.count_image)
    # Half floats have 11 bits.
    np.testing.assert_allclose(read.image, STATISTICS.image, rtol=2**-11)
    path.write_bytes(b"nothing")
    with pytest.raises(BundleFileError):
        ActivationStatistics.read(path)


def test_quantiles_are_those_of_numpy_whether_dense_or_sparse() -> None:
    z = np.maximum(RNG.standard_normal((300, 5)), 0).astype(np.float32)
    dense = ActivationStatistics.measure(z, z)
    sparse = ActivationStatistics.measure(scipy.sparse.csr_array(z), scipy.sparse.csr_array(z))
    for j in range(5):
        np.testing.assert_allclose(dense.image[j], np.quantile(z[z[:, j] > 0, j], PROBABILITIES), rtol=1e-6)
    np.testing.assert_array_equal(dense.image, sparse.image)


@pytest.mark.parametrize(
    ("edit", "kind", "field"),
    [
        (Edit((N,), Scale(1.0)), UnknownFeature, "edits[0].ids"),
        (Edit((0,), Scale(1.0), 4.5), InvalidInput, "edits[0].strength"),
        (Edit(Label.DEAD, Scale(1.0)), InvalidInput, "edits[0].label"),
    ],
)
def test_an_edit_that_cannot_be_applied_names_its_field(
    edit: Edit, kind: type[InvalidInput], field: str
) -> None:
    with pytest.raises(kind) as caught:
        apply(edit)
    assert caught.value.violations[0][0] == field


def test_what_the_bundle_lacks_is_said() -> None:
    bare = replace(SPACE, table=None, statistics=None)
    with pytest.raises(SteeringUnsupported, match="no modality table"):
        apply(Edit(Label.TEXT, Scale(1.0)), space=bare)
    with pytest.raises(SteeringUnsupported, match="no activation quantiles"):
        apply(Edit((0,), SetQuantile(0.5)), space=bare)


def test_the_residual_is_kept_and_the_norm_too() -> None:
    e = embedding()
    steered = steer(e, Z, Steering((Edit((0, 1), FromReference(text="x")),)), SPACE, encode_reference)
    moved = e.unit.astype(np.float64) + (REFERENCE[:2].astype(np.float64) - Z[:2]) @ ROWS[:2]
    moved /= np.linalg.norm(moved)
    np.testing.assert_allclose(steered.unit, moved, atol=1e-6)
    assert steered.norm == e.norm
    assert steered.delta == pytest.approx(np.linalg.norm(moved - e.unit), rel=1e-5)


def test_no_change_gives_back_the_very_embedding() -> None:
    e = embedding()
    for steering in (
        Steering((Edit(Label.IMAGE, SetQuantile(0.9), strength=0.0),)),
        Steering((Edit(Label.IMAGE, SetQuantile(0.9), strength=0.0),), delta=0.5),
        Steering((Edit(Label.IMAGE, SetQuantile(0.9)),), delta=0.0),
    ):
        steered = steer(e, Z, steering, SPACE, encode_reference)
        assert steered.unit is e.unit
        assert steered.delta == 0.0


@settings(max_examples=200)
@given(seed=st.integers(0, 10_000), delta=st.floats(0.001, 0.4), scale=st.floats(0.01, 100))
def test_a_change_is_rescaled_to_the_size_that_is_asked(seed: int, delta: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal(D)
    unit /= np.linalg.norm(unit)
    # Not nearly along the embedding, where a turn of any size would take an endless change.
    across = rng.standard_normal(D)
    across -= (across @ unit) * unit
    direction = scale * (across / np.linalg.norm(across) + rng.uniform(-1, 1) * unit)
    moved = unit + rescaled(unit, direction, delta)
    moved /= np.linalg.norm(moved)
    # Rounding of float64, magnified by the division of a short chord.
    assert np.linalg.norm(moved - unit) == pytest.approx(delta, rel=1e-9, abs=1e-12)
    # The same way as the change itself, not the opposite one.
    assert (moved - unit) @ (direction - (direction @ unit) * unit) > 0


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    unit = np.eye(D)[0]
    for direction in (unit, unit + 0.1 * np.eye(D)[1], -unit):
        with pytest.raises(InvalidInput) as caught:
            rescaled(unit, direction, 1.5)
        assert caught.value.reason == "DELTA_OUT_OF_REACH"


@pytest.mark.parametrize("delta", [None, 0.2])
def test_edits_that_leave_nothing_are_refused(delta: float | None) -> None:
    neurons = FeatureSpace("neurons", D, True, lambda modality: np.eye(D, dtype=np.float32))
    e = embedding()
    everything = Steering((Edit(tuple(range(D)), Scale(0.0)),), delta=delta)
    with pytest.raises(InvalidInput) as caught:
        steer(e, e.unit, everything, neurons, encode_reference)
    field, reason = ("edits", "INVALID_INPUT") if delta is None else ("delta", "DELTA_OUT_OF_REACH")
    assert (caught.value.violations[0][0], caught.value.reason) == (field, reason)


def test_edits_of_different_features_become_equally_large() -> None:
    e = embedding()
    deltas = [
        steer(e, Z, Steering((Edit(label, SetQuantile(0.9)),), delta=0.2), SPACE, encode_reference).delta
        for label in (Label.IMAGE, Label.TEXT, Label.CROSS)
    ]
    np.testing.assert_allclose(deltas, 0.2, rtol=1e-6)


def test_the_change_of_hidden_states_is_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    w, change = torch.randn(D, 20, generator=generator), torch.randn(D, generator=generator)
    moved = hidden_change(w, change, ridge=1e-9)
    # Without ridge: the embedding moves by exactly the change, and no shorter move does it.
    torch.testing.assert_close(w @ moved, change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved, torch.linalg.pinv(w) @ change, atol=1e-5, rtol=1e-5)
    ridge = 0.5
    scale = ridge * float((w @ w.T).diagonal().mean())
    stacked = torch.cat([w, scale**0.5 * torch.eye(20)])
    expected = torch.linalg.lstsq(stacked, torch.cat([change, torch.zeros(20)])).solution
    # Ridge regression as least squares with extra rows: another algorithm, in float32.
    torch.testing.assert_close(hidden_change(w, change, ridge), expected, atol=1e-4, rtol=1e-4)


def test_hidden_states_move_from_the_end_token_on_and_keep_their_norms() -> None:
    hidden = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    change = torch.randn(20, generator=torch.Generator().manual_seed(1))
    steered = steered_hidden_states(hidden, 3, change)
    assert torch.equal(steered[:3], hidden[:3])
    torch.testing.assert_close(steered.norm(dim=-1), hidden.norm(dim=-1))
    directions = torch.nn.functional.cosine_similarity(steered[3:], hidden[3:] + change, dim=-1)
    torch.testing.assert_close(directions, torch.ones(5))
    assert steered_hidden_states(hidden, 3, torch.zeros(20)) is hidden
