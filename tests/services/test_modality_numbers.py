"""Every formula against a loop in numpy, scipy or scikit-learn, and its invariants."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from services.dictionaries.base import SparseRow
from services.modality import scores
from services.modality.coactivation import benjamini_hochberg, coactivation, permutation_p_values, standardise
from services.modality.energy import energy_share
from services.modality.labels import MIN_UNITS, cohen_kappa, label_agreement, label_features
from services.modality.scores import (
    active_units,
    bootstrap_mds,
    energies,
    energy_mds,
    expanded_tails,
    firing_rates,
    paper_mds,
    resampling_weights,
    stack_rows,
)
from services.modality.tables import Label

LABELS = np.array([label.value for label in Label])


def sparse_pairs(
    seed: int, n: int = 30, features: int = 6, rate: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image, text = (rng.gamma(2.0, 1.0, (n, features)) * (rng.random((n, features)) < rate) for _ in range(2))
    return image.astype(np.float32), text.astype(np.float32)


seeds = st.integers(0, 10_000)
forms = pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])


@forms
@settings(max_examples=30)
@given(seed=seeds)
def test_energies_are_the_equation(form, seed):
    z, _ = sparse_pairs(seed)
    expected = np.array([np.mean((z[:, j] / np.sqrt(np.mean(z**2))) ** 2) for j in range(z.shape[1])])
    np.testing.assert_allclose(energies(form(z)), expected, rtol=1e-5)
    assert energies(form(z)).mean() == pytest.approx(1.0)


@forms
@settings(max_examples=30)
@given(seed=seeds)
def test_the_papers_mds_is_the_equation(form, seed):
    image, text = sparse_pairs(seed)
    text[:, 0] = image[:, 0] = 0
    mds, pairs = paper_mds(form(-image), form(text))
    for j in range(image.shape[1]):
        shares = [abs(a) / (abs(a) + abs(b)) for a, b in zip(image[:, j], text[:, j], strict=True) if a or b]
        assert pairs[j] == len(shares)
        assert mds[j] == pytest.approx(np.mean(shares), rel=1e-5) if shares else np.isnan(mds[j])


@settings(max_examples=30)
@given(seed=seeds)
def test_scores_lie_in_the_unit_interval_and_mirror_when_the_modalities_swap(seed):
    image, text = sparse_pairs(seed)
    for score in (
        lambda a, b: energy_mds(energies(a), energies(b)),
        lambda a, b: paper_mds(a, b)[0],
    ):
        forward, backward = score(image, text), score(text, image)
        alive = ~np.isnan(forward)
        assert ((forward[alive] >= 0) & (forward[alive] <= 1)).all()
        np.testing.assert_allclose(forward + backward, np.where(alive, 1.0, np.nan), atol=1e-6)


@settings(max_examples=20)
@given(seed=seeds)
def test_intervals_mirror_and_hold_the_score(seed):
    image, text = sparse_pairs(seed, n=60)
    low, high = bootstrap_mds(image, text, resamples=200, seed=seed)
    low_swapped, high_swapped = bootstrap_mds(text, image, resamples=200, seed=seed)
    np.testing.assert_allclose(low + high_swapped, 1.0, atol=1e-5)
    np.testing.assert_allclose(high + low_swapped, 1.0, atol=1e-5)
    wide_low, wide_high = bootstrap_mds(image, text, resamples=200, seed=seed, level=0.999)
    mds = energy_mds(energies(image), energies(text))
    assert ((wide_low <= mds) & (mds <= wide_high)).all()
    assert ((wide_low <= low) & (low <= high) & (high <= wide_high)).all()


def expanded(replicates: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The interval of each column of replicates, one quantile at a time."""
    shares = scipy.stats.norm.cdf(np.sqrt(units / (units - 1)) * scipy.stats.t.ppf(0.025, units - 1))
    columns = zip(np.asarray(replicates).T, shares, strict=True)
    return np.array([np.quantile(column, [share, 1 - share]) for column, share in columns]).T


@forms
def test_the_bootstrap_is_what_resampling_rows_gives(form):
    image, text = sparse_pairs(1, n=40)
    interval = bootstrap_mds(form(image), form(text), resamples=120, seed=5)
    rng = np.random.default_rng(5)
    replicates = []
    for _ in range(120):
        rows = rng.integers(0, 40, 40)
        replicates.append(energy_mds(energies(image[rows]), energies(text[rows])))
    np.testing.assert_allclose(interval, expanded(replicates, active_units(image, text)), atol=1e-5)


def test_the_bootstrap_by_group_is_what_resampling_groups_gives():
    image, text = sparse_pairs(2, n=40)
    groups = np.repeat([7, 3, 9, 1, 4, 2, 8, 0], 5)
    interval = bootstrap_mds(image, text, resamples=80, seed=5, groups=groups)
    rng = np.random.default_rng(5)
    replicates = []
    for _ in range(80):
        drawn = np.unique(groups)[rng.integers(0, 8, 8)]
        rows = np.concatenate([np.flatnonzero(groups == g) for g in drawn])
        mds = energy_mds(energies(image[rows]), energies(text[rows]))
        replicates.append(np.where(np.isnan(mds), 0.5, mds))
    np.testing.assert_allclose(interval, expanded(replicates, active_units(image, text, groups)), atol=1e-5)


def test_tails_are_those_of_a_t_quantile_and_reach_the_plain_ones_with_many_units():
    # 4 units: t with 3 degrees of freedom has 2.5% under -3.1824; times sqrt(4 / 3), that is 3.67 deviations.
    assert expanded_tails(np.array([4]))[0] == pytest.approx(scipy.stats.norm.cdf(-3.6748), rel=1e-3)
    assert expanded_tails(np.array([0, 1])).tolist() == [0, 0]
    assert expanded_tails(np.array([100_000]))[0] == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize(("units", "bound"), [(1, 0.025), (12, 0.7354), (13, 0.7529), (64, 0.944)])
def test_with_energy_on_one_side_alone_the_interval_is_exact(units, bound):
    """As of a share of `units` out of `units`: [bound, 1], by Clopper and Pearson."""
    image = np.zeros((100, 2), np.float32)
    image[:units, 0] = 1 + np.arange(units) / units
    other = np.zeros_like(image)
    other[:, 1] = 1
    low, high = bootstrap_mds(image, other, resamples=200)
    exact = scipy.stats.binomtest(units, units).proportion_ci(method="exact")
    assert [low[0], high[0]] == pytest.approx([exact.low, 1.0])
    assert low[0] == pytest.approx(bound, abs=1e-3)
    low, high = bootstrap_mds(other, image, resamples=200)
    assert [low[0], high[0]] == pytest.approx([0.0, 1 - exact.low])


@forms
def test_the_bootstrap_in_blocks_of_features_is_the_one_of_all_at_once(form, monkeypatch):
    image, text = (form(x) for x in sparse_pairs(3, n=40))
    whole = bootstrap_mds(image, text, resamples=120, seed=5)
    monkeypatch.setattr(scores, "REPLICATES", 120 * 3)
    # Bit for bit where sparse; a dense product of fewer rows may round its float32 sums otherwise.
    atol = 0 if form is csr_array else 1e-6
    np.testing.assert_allclose(bootstrap_mds(image, text, resamples=120, seed=5), whole, rtol=0, atol=atol)


def test_the_bootstrap_holds_no_more_replicates_than_it_says(monkeypatch):
    rng = np.random.default_rng(0)
    z = csr_array((rng.random((20, 4_000)) < 0.05).astype(np.float32))
    monkeypatch.setattr(scores, "REPLICATES", 500_000)
    tracemalloc.start()
    bootstrap_mds(z, z, resamples=1_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All replicates would be 16 MB, and their quantiles take a copy.
    assert peak < 12_000_000


def test_resampling_weights_are_multinomial():
    weights = resampling_weights(50, 4000, np.random.default_rng(0))
    assert (weights.sum(axis=1) == 50).all()
    # 4,000 draws of a count with mean 1 and variance 1 - 1/50: standard errors 0.016 and about 0.025.
    assert abs(weights.mean(axis=0) - 1).max() < 0.08
    assert weights.var(axis=0).mean() == pytest.approx(0.98, abs=0.03)


def planted(
    units: int, share: float, sides: str, features: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Activations of features with a true MDS of `share`, each in `units` of 60 pairs.

    Energies vary as much as their mean. A unit has energy on both sides, or on either with even odds, or on one:
    the image with odds `share`.
    """
    n = 60
    active = np.argsort(rng.random((n, features)), axis=0) < units
    energy = rng.gamma(1.0, 1.0, (2, n, features))
    if sides == "one":
        image = rng.random((n, features)) < share
        fires, scale = [image, ~image], [1, 1]
    else:
        # 0 is the image alone, 1 the text alone, 2 both.
        which = rng.integers(0, 3, (n, features)) if sides == "either" else np.full((n, features), 2)
        fires, scale = [which != 1, which != 0], [share, 1 - share]
    return [
        np.sqrt(active * on * factor * e).astype(np.float32)
        for on, factor, e in zip(fires, scale, energy, strict=True)
    ]


def coverage(units: int, sides: str, shares: tuple[float, ...] = (0.25, 0.5, 0.75)) -> float:
    """How often the interval at 95% holds the true MDS, over 900 features."""
    rng = np.random.default_rng(units)
    both = [planted(units, share, sides, 300, rng) for share in (*shares, *(1 - s for s in shares))]
    # With its mirror image for each share, the mean energy of a side is the same and moves no MDS.
    image, text = (np.concatenate([pair[side] for pair in both], axis=1) for side in (0, 1))
    low, high = bootstrap_mds(image, text, resamples=300)
    truth = np.repeat([*shares, *(1 - s for s in shares)], 300)
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("units", [4, MIN_UNITS, 20, 40])
def test_the_interval_covers_the_truth_at_least_93_times_in_100_however_few_units_there_are(units):
    covered = {sides: coverage(units, sides) for sides in ("both", "either", "one")}
    # Of 1,800 features each: a standard error of .6%. A unit that is all on one side is the hardest.
    assert np.mean(list(covered.values())) >= 0.93
    assert min(covered.values()) >= 0.9


@forms
def test_coactivation_is_pearsons_correlation(form):
    image, text = sparse_pairs(3, n=200)
    text[:, 1] = image[:, 1] * 2
    text[:, 2] = 0
    text[:, 3] = 1
    correlation, p = coactivation(form(image), form(text), shuffles=100)
    for j in (0, 1, 4, 5):
        assert correlation[j] == pytest.approx(scipy.stats.pearsonr(image[:, j], text[:, j])[0], abs=1e-6)
    assert correlation[1] == pytest.approx(1.0)
    assert np.isnan(correlation[[2, 3]]).all()
    assert np.isnan(p[[2, 3]]).all()


def test_p_values_of_shifts_and_of_free_shuffles_agree_with_scipys_permutation_test():
    rng = np.random.default_rng(0)
    n = 400
    image, text = sparse_pairs(4, n=n, features=8)
    # Some features with a weak true correlation, so that p is neither 0 nor 1.
    text[:, :4] += 0.1 * image[:, :4]
    x, y = standardise(image.astype(float)), standardise(text.astype(float))
    _, by_shift = permutation_p_values(x, y, 100, rng)
    _, by_shuffle = permutation_p_values(x, y, 2000, rng)
    for j in range(8):
        expected = scipy.stats.permutation_test(
            (image[:, j].astype(float),),
            lambda a, j=j: a @ text[:, j],
            permutation_type="pairings",
            alternative="greater",
            n_resamples=4000,
            rng=np.random.default_rng(1),
        ).pvalue
        # Standard errors of a p-value near 0.5: 2.5% by 400 shifts, 1.1% by 2,000 shuffles.
        assert by_shift[j] == pytest.approx(expected, abs=0.1)
        assert by_shuffle[j] == pytest.approx(expected, abs=0.05)


def test_p_values_on_tiny_data_agree_with_all_permutations():
    image = np.array([[3.0], [2.0], [1.0], [0.0], [0.0]])
    text = np.array([[2.0], [3.0], [0.0], [1.0], [0.0]])
    exact = scipy.stats.permutation_test(
        (image[:, 0],),
        lambda a: a @ text[:, 0],
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    ).pvalue
    _, p = coactivation(image.astype(np.float32), text.astype(np.float32), shuffles=5000)
    # 5,000 shuffles: standard error 0.4% at p near 0.1.
    assert p[0] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("shuffles", [200, 1000], ids=["shifts", "shuffles"])
def test_the_test_keeps_its_level_when_nothing_is_related(rate, shuffles):
    image, text = sparse_pairs(5, n=600, features=1500 if shuffles == 200 else 300, rate=rate)
    _, p = coactivation(image, text, shuffles=shuffles)
    p = p[~np.isnan(p)]
    for level in (0.05, 0.2):
        # Ties make p conservative; above the level only by chance (four standard errors).
        assert (p <= level).mean() <= level + 4 * np.sqrt(level * (1 - level) / len(p))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_q_values_are_scipys(p):
    np.testing.assert_allclose(
        benjamini_hochberg(np.array(p)), scipy.stats.false_discovery_control(p), rtol=1e-12, atol=1e-300
    )


def test_q_values_leave_out_what_was_not_tested():
    p = np.array([0.01, np.nan, 0.04])
    q = benjamini_hochberg(p)
    np.testing.assert_allclose(q[[0, 2]], scipy.stats.false_discovery_control(p[[0, 2]]))
    assert np.isnan(q[1])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=2, max_size=40))
def test_kappa_is_scikit_learns(pairs):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    ours = cohen_kappa(first, second)
    if len(set(first) | set(second)) == 1:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(sklearn.metrics.cohen_kappa_score(first, second), abs=1e-12)


def test_agreement_leaves_out_features_dead_in_both():
    first = np.array(["DEAD", "DEAD", "IMAGE", "TEXT", "CROSS"])
    second = np.array(["DEAD", "IMAGE", "IMAGE", "TEXT", "CROSS"])
    agreement = label_agreement(first, second)
    assert agreement.features == 4
    assert agreement.kappa == cohen_kappa(first[1:], second[1:])
    assert np.isnan(label_agreement(first[:1], second[:1]).kappa)


@settings(max_examples=30)
@given(seed=seeds)
def test_shares_of_energy_add_up_to_one_and_ignore_scale(seed):
    z, _ = sparse_pairs(seed)
    labels = LABELS[np.arange(z.shape[1]) % len(LABELS)]
    for row in z:
        active = np.flatnonzero(row)
        share, by_label = energy_share(row[active], labels[active])
        assert set(by_label) == set(Label)
        if not active.size:
            assert (share.size, set(by_label.values())) == (0, {0.0})
            continue
        np.testing.assert_allclose(share, row[active] ** 2 / (row**2).sum(), atol=1e-6)
        for label in Label:
            expected = (row[labels == label.value] ** 2).sum() / (row**2).sum()
            assert by_label[label] == pytest.approx(expected, abs=1e-6)
        assert sum(by_label.values()) == pytest.approx(1)
        louder, _ = energy_share(row[active] * 4, labels[active])
        np.testing.assert_allclose(louder, share)


@pytest.mark.parametrize(
    ("low", "high", "significant", "alive", "expected"),
    [
        (0.76, 0.99, False, True, "IMAGE"),
        (0.75, 0.99, False, True, "UNRESOLVED"),
        (0.01, 0.24, True, True, "TEXT"),
        (0.01, 0.25, True, True, "UNRESOLVED"),
        (0.25, 0.75, True, True, "CROSS"),
        (0.25, 0.75, False, True, "UNRESOLVED"),
        (0.24, 0.75, True, True, "UNRESOLVED"),
        (0.10, 0.90, True, True, "UNRESOLVED"),
        (np.nan, np.nan, False, False, "DEAD"),
    ],
)
def test_labels_follow_the_table(low, high, significant, alive, expected):
    units = np.array([100 * alive])
    label = label_features(np.array([low]), np.array([high]), np.array([significant]), units)
    assert label.tolist() == [expected]


@pytest.mark.parametrize(("low", "high"), [(0.76, 0.99), (0.01, 0.24), (0.25, 0.75)])
def test_no_label_rests_on_fewer_than_the_fewest_units(low, high):
    units = np.arange(MIN_UNITS + 1)
    interval = np.full(len(units), low), np.full(len(units), high)
    labels = label_features(*interval, np.ones(len(units), bool), units)
    assert labels[:MIN_UNITS].tolist() == ["DEAD"] + ["UNRESOLVED"] * (MIN_UNITS - 1)
    assert labels[MIN_UNITS] in {"IMAGE", "TEXT", "CROSS"}


@pytest.mark.parametrize("text_form", [np.asarray, csr_array], ids=["dense texts", "sparse texts"])
@pytest.mark.parametrize("image_form", [np.asarray, csr_array], ids=["dense images", "sparse images"])
def test_active_units_are_the_pairs_or_groups_with_an_activation_on_either_side(image_form, text_form):
    image = np.array([[1, 0, 0], [0, 0, 0], [0, 0, -2], [0, 0, 1]], np.float32)
    text = np.array([[0, 0, 0], [3, 0, 0], [0, 0, 1], [0, 0, 0]], np.float32)
    assert active_units(image_form(image), text_form(text)).tolist() == [2, 0, 2]
    groups = np.array([7, 7, 4, 4])
    assert active_units(image_form(image), text_form(text), groups).tolist() == [1, 0, 1]


@forms
def test_firing_rates_count_what_is_not_zero(form):
    z = np.array([[1, 0, -1], [0, 0, 2]], np.float32)
    assert firing_rates(form(z)).tolist() == [0.5, 0.0, 1.0]


def test_stacked_rows_are_the_dense_matrix():
    rows = [
        SparseRow(np.array([0, 2], np.int32), np.array([1, 2], np.float32)),
        SparseRow(np.array([], np.int32), np.array([], np.float32)),
        SparseRow(np.array([1], np.int32), np.array([3], np.float32)),
    ]
    assert stack_rows(rows, 3).toarray().tolist() == [[1, 0, 2], [0, 0, 0], [0, 3, 0]]
    assert stack_rows([], 3).shape == (0, 3)
