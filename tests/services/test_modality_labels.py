"""Labels against a dictionary whose truth is known, and the paper's rule against the same."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import f1_score

from services.errors import NotEnoughPairs
from services.modality.coactivation import coactivation
from services.modality.labels import paper_labels
from services.modality.scores import energies, energy_mds, paper_mds
from services.modality.table import ModalitySettings, score_pairs, split_half_agreement
from services.modality.tables import Label

FAST = ModalitySettings(resamples=300, shuffles=300)
N_PAIRS = 3000


def synthetic(
    truth: list[Label], seed: int = 0, rate: float = 0.1, gap: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Activations of a dictionary whose labels are `truth`; texts activate everything `gap` times as strongly.

    A concept is present in a pair at `rate`. An IMAGE feature fires on the image of the pair, a TEXT feature on the
    text, a CROSS feature on both, each with 5% of its energy leaking to the other side at random; an UNRESOLVED
    feature fires on both sides of different pairs; a DEAD one never.
    """
    rng = np.random.default_rng(seed)
    z_image = np.zeros((N_PAIRS, len(truth)), np.float32)
    z_text = np.zeros_like(z_image)
    for j, label in enumerate(truth):
        present, elsewhere = rng.random((2, N_PAIRS)) < rate
        strength = rng.gamma(4.0, 0.25, (2, N_PAIRS))
        leak = (rng.random((2, N_PAIRS)) < 0.05 * rate) * strength
        image = present if label in (Label.IMAGE, Label.CROSS, Label.UNRESOLVED) else leak[0] > 0
        text = present if label in (Label.TEXT, Label.CROSS) else leak[1] > 0
        if label is Label.UNRESOLVED:
            text = elsewhere
        if label is not Label.DEAD:
            z_image[:, j] = image * strength[0]
            z_text[:, j] = text * strength[1] * gap
    return z_image, z_text


def spread(counts: dict[Label, int]) -> list[Label]:
    return [label for label, count in counts.items() for _ in range(count)]


BALANCED = spread(dict.fromkeys(Label, 12))
SPLIT = spread({Label.IMAGE: 30, Label.TEXT: 30})
MOSTLY_SINGLE = spread({Label.IMAGE: 28, Label.TEXT: 22, Label.CROSS: 10})
MOSTLY_CROSS = spread({Label.CROSS: 54, Label.IMAGE: 3, Label.TEXT: 3})


def macro_f1(truth: list[Label], labels: np.ndarray) -> float:
    return float(f1_score([label.value for label in truth], labels, average="macro"))


@pytest.mark.parametrize(
    "truth",
    [BALANCED, SPLIT, MOSTLY_SINGLE, MOSTLY_CROSS],
    ids=["balanced", "split", "mostly-single", "mostly-cross"],
)
def test_known_labels_are_recovered(truth):
    assert macro_f1(truth, score_pairs(*synthetic(truth), FAST).label) >= 0.95


@pytest.mark.parametrize("truth", [BALANCED, SPLIT], ids=["balanced", "split"])
def test_the_papers_rule_fails_on_the_same_dictionaries(truth):
    """It has no word for features that fire on both sides apart, and none for a split."""
    assert macro_f1(truth, score_pairs(*synthetic(truth), FAST).paper_label) <= 0.8


def test_the_papers_rule_is_right_where_labels_are_balanced_and_there_is_no_modality_gap():
    truth = spread({Label.IMAGE: 20, Label.CROSS: 20, Label.TEXT: 20, Label.DEAD: 5})
    table = score_pairs(*synthetic(truth, gap=1.0), FAST)
    labels = [label.value for label in truth]
    assert table.paper_label.tolist() == table.label.tolist() == labels


def test_the_energy_mds_leans_where_one_modality_has_many_more_features():
    """A limit of the definition: each modality's energy is shared out among the features that take part in it.

    With 40 IMAGE, 10 TEXT and 10 CROSS features a CROSS feature has 1/50 of the images' energy and 1/20 of the
    texts', an MDS of 20 / (20 + 50) = 0.29. It is still told from TEXT, but its interval may leave 0.5 +- 0.25.
    """
    truth = spread({Label.IMAGE: 40, Label.TEXT: 10, Label.CROSS: 10})
    table = score_pairs(*synthetic(truth), FAST)
    assert table.mds_energy[50:].mean() == pytest.approx(20 / 70, abs=0.03)
    assert set(table.label[50:]) <= {"CROSS", "UNRESOLVED"}


def test_defect_1_mu_plus_minus_sigma_calls_a_perfectly_split_dictionary_cross():
    """Half at MDS 0 and half at 1: mu = 0.5, sigma = 0.5, and nothing lies beyond 0 or 1."""
    mds = np.array([0.0] * 50 + [1.0] * 50)
    assert set(paper_labels(mds)) == {"CROSS"}
    z_image, z_text = synthetic(SPLIT)
    z_image[:, 30:] = 0
    z_text[:, :30] = 0
    table = score_pairs(z_image, z_text, FAST)
    assert set(table.paper_label) == {"CROSS"}
    assert table.label.tolist() == ["IMAGE"] * 30 + ["TEXT"] * 30


def test_defect_2_most_pairs_are_0_over_0_under_topk():
    """Without conditioning the mean is NaN; with 0/0 counted as 0 a pure image feature scores its firing rate."""
    z_image, z_text = synthetic([Label.IMAGE])
    z_text[:] = 0
    with np.errstate(invalid="ignore"):
        naive = z_image / (z_image + z_text)
    assert np.isnan(naive.mean())
    assert np.nan_to_num(naive).mean() < 0.15
    mds, pairs = paper_mds(z_image, z_text)
    assert mds[0] == 1.0
    assert pairs[0] == np.count_nonzero(z_image) < 0.15 * N_PAIRS


def test_defect_3_an_mds_of_one_half_does_not_mean_that_both_sides_fire_together():
    truth = [Label.CROSS] * 20 + [Label.UNRESOLVED] * 20
    z_image, z_text = synthetic(truth)
    mds = energy_mds(energies(z_image), energies(z_text))
    assert (abs(mds - 0.5) < 0.1).all()
    correlation, _ = coactivation(z_image, z_text)
    assert correlation[:20].min() > 0.5
    assert abs(correlation[20:]).max() < 0.1
    table = score_pairs(z_image, z_text, FAST)
    assert table.label.tolist() == [label.value for label in truth]
    # The paper's rule has no word for it.
    assert "UNRESOLVED" not in table.paper_label


def test_a_scale_common_to_a_modality_does_not_move_the_energy_mds_but_moves_the_papers():
    z_image, z_text = synthetic(BALANCED)
    usual, scaled = score_pairs(z_image, z_text, FAST), score_pairs(z_image, z_text * 10, FAST)
    # The float32 products round at 6e-8, relatively.
    np.testing.assert_allclose(usual.mds_energy, scaled.mds_energy, atol=1e-5)
    assert np.nanmax(abs(usual.mds_paper - scaled.mds_paper)) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_pairs_give_no_cross(seed):
    z_image, z_text = synthetic(BALANCED, seed)
    shuffled = z_text[np.random.default_rng(seed).permutation(N_PAIRS)]
    settings = ModalitySettings(resamples=200, shuffles=300, seed=seed)
    table = score_pairs(z_image, shuffled, settings)
    # 12 are planted; one more may be a false discovery, at the rate of 5% that is allowed.
    assert (score_pairs(z_image, z_text, settings).label == "CROSS").sum() in (12, 13)
    # The false discovery rate is 5%: with all nulls true, one false call in 5 runs of 48 features is chance.
    assert (table.label == "CROSS").sum() <= 1


def test_labels_agree_across_halves_of_the_data():
    agreement = split_half_agreement(*synthetic(BALANCED), FAST)
    assert agreement.kappa > 0.9
    assert agreement.low <= agreement.kappa <= agreement.high
    assert agreement.features == 48  # without the dead


def test_halves_of_grouped_pairs_share_no_group():
    z_image, z_text = synthetic(BALANCED)
    groups = np.arange(N_PAIRS) // 3
    assert split_half_agreement(z_image, z_text, FAST, groups).kappa > 0.9


def test_a_feature_that_fires_in_three_pairs_gets_no_label_and_in_many_it_does():
    z_image, z_text = synthetic([Label.CROSS] * 5)
    rare = np.zeros((N_PAIRS, 2), np.float32)
    rare[:3, 0] = 1
    rare[:30, 1] = 1
    table = score_pairs(np.hstack([z_image, rare]), np.hstack([z_text, 0 * rare]), FAST)
    assert table.mds_energy[5:].tolist() == [1.0, 1.0]
    assert table.label[5:].tolist() == ["UNRESOLVED", "IMAGE"]


@pytest.mark.parametrize("copies", [1, 3], ids=["pairs", "groups"])
def test_a_feature_that_fires_on_both_sides_of_three_pairs_is_not_cross_for_what_silence_counts_as(copies):
    z_image, z_text = synthetic([Label.CROSS] * 5)
    rare = np.zeros((N_PAIRS // copies, 4), np.float32)
    for column, pairs in enumerate((1, 2, 3, 30)):
        rare[:pairs, column] = 1
    rare = np.repeat(rare, copies, axis=0)
    groups = np.arange(N_PAIRS) // copies if copies > 1 else None
    # Texts activate everything three times as strongly.
    table = score_pairs(np.hstack([z_image, rare]), np.hstack([z_text, 3 * rare]), FAST, groups)
    # Together far beyond chance, and the interval holds only one half: still no evidence.
    assert table.coactivation_significant[6:].all()
    assert table.label[5:].tolist() == ["UNRESOLVED"] * 3 + ["CROSS"]


def test_pairs_that_repeat_a_concept_are_not_taken_for_independent_ones():
    """Ten copies of each of 60 unrelated pairs look significant by the pair and are not by the group."""
    rng = np.random.default_rng(3)
    n_features = 200
    groups = np.repeat(np.arange(60), 10)
    z_image, z_text = (rng.random((60, n_features)).astype(np.float32)[groups] for _ in range(2))
    settings = ModalitySettings(resamples=100, shuffles=500)
    naive = score_pairs(z_image, z_text, settings).coactivation_significant.sum()
    grouped = score_pairs(z_image, z_text, settings, groups)
    assert naive > 20
    assert grouped.coactivation_significant.sum() <= 1
    width = grouped.mds_energy_high - grouped.mds_energy_low
    narrow = score_pairs(z_image, z_text, settings)
    # Ten copies shrink an interval by sqrt(10) = 3.2.
    assert np.median(width / (narrow.mds_energy_high - narrow.mds_energy_low)) == pytest.approx(3.16, rel=0.2)


def test_dense_and_sparse_activations_give_the_same_table():
    z_image, z_text = synthetic(BALANCED)
    dense = score_pairs(z_image, z_text, FAST)
    sparse = score_pairs(csr_array(z_image), csr_array(z_text), FAST)
    assert dense.label.tolist() == sparse.label.tolist()
    for column in ("mds_energy", "mds_energy_low", "mds_paper", "coactivation", "coactivation_q"):
        np.testing.assert_allclose(getattr(dense, column), getattr(sparse, column), atol=1e-6)


def test_the_same_seed_gives_the_same_table():
    pairs = synthetic(BALANCED)
    first, second = score_pairs(*pairs, FAST), score_pairs(*pairs, FAST)
    np.testing.assert_array_equal(first.mds_energy_low, second.mds_energy_low)
    np.testing.assert_array_equal(first.coactivation_p, second.coactivation_p)


def test_two_pairs_are_scored_without_nonsense_and_one_is_refused():
    z = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    table = score_pairs(z, z, FAST)
    assert table.label.tolist() == ["UNRESOLVED", "DEAD"]
    assert np.isnan(table.mds_energy[1])
    with pytest.raises(NotEnoughPairs):
        score_pairs(z[:1], z[:1], FAST)


def test_activations_that_are_all_zero_are_dead():
    z = np.zeros((10, 4), np.float32)
    table = score_pairs(z, z, FAST)
    assert set(table.label) == {"DEAD"}
    assert set(table.paper_label) == {"DEAD"}


@pytest.mark.parametrize("shuffles", [10, N_PAIRS], ids=["shifts", "free shuffles"])
def test_scoring_asks_in_each_of_its_loops_whether_to_go_on(shuffles):
    asking = set()
    z_image, z_text = synthetic(spread(dict.fromkeys(Label, 1)))
    settings = ModalitySettings(resamples=100, shuffles=shuffles)
    score_pairs(z_image, z_text, settings, check=lambda: asking.add(sys._getframe(1).f_code.co_name))
    free = {"permutation_p_values"} if shuffles == N_PAIRS else set()
    assert asking == {"bootstrap_mds", "coactivation"} | free
