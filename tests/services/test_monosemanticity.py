from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from services.modality.monosemanticity import (
    emb_sim,
    embedding_features,
    mean_over_features,
    mean_pairwise_cosine,
    population_similarity,
    random_cosines,
    top_samples,
    win_rate,
)

N_SAMPLES, N_CLUSTERS, D = 400, 10, 16


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A judge that sees clusters, and activations: one feature a cluster, then features that fire at random."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(N_SAMPLES) % N_CLUSTERS
    judge = rng.standard_normal((N_CLUSTERS, D))[cluster] + 0.3 * rng.standard_normal((N_SAMPLES, D))
    judge /= np.linalg.norm(judge, axis=1, keepdims=True)
    one_thing = (cluster[:, None] == np.arange(N_CLUSTERS)) * rng.random((N_SAMPLES, N_CLUSTERS))
    anything = (rng.random((N_SAMPLES, N_CLUSTERS)) < 0.1) * rng.random((N_SAMPLES, N_CLUSTERS))
    return judge.astype(np.float32), np.hstack([one_thing, anything]).astype(np.float32)


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 6))
def test_top_samples_are_the_strongest_positive_ones(form, seed, m):
    rng = np.random.default_rng(seed)
    z = (rng.integers(-2, 4, (12, 5)) * (rng.random((12, 5)) < 0.7)).astype(np.float32)
    samples, enough = top_samples(form(z), m)
    for j in range(5):
        ranked = sorted((i for i in range(12) if z[i, j] > 0), key=lambda i: (-z[i, j], i))
        assert enough[j] == (len(ranked) >= m)
        if enough[j]:
            assert samples[j].tolist() == ranked[:m]


@pytest.mark.parametrize("form", [np.asarray, csr_array], ids=["dense", "sparse"])
def test_of_one_concept_the_strongest_sample_counts_alone(form):
    # Concepts 0, 0, 1, 1, 2: the strongest of each, strongest first.
    z = np.array([[5, 1], [4, 0], [2, 0], [3, 2], [1, 3]], np.float32)
    samples, enough = top_samples(form(z), 3, np.array([0, 0, 1, 1, 2]))
    assert samples[0].tolist() == [0, 3, 4]
    assert samples[1].tolist() == [4, 3, 0]
    assert enough.tolist() == [True, True]
    assert not top_samples(form(z), 4, np.array([0, 0, 1, 1, 2]))[1].any()


def test_without_it_copies_of_one_thing_pass_for_many_things_alike():
    rng = np.random.default_rng(0)
    judge = rng.normal(size=(40, 64)).astype(np.float32)
    judge = np.repeat(judge / np.linalg.norm(judge, axis=1, keepdims=True), 10, axis=0)
    groups = np.repeat(np.arange(40), 10)
    z = rng.random((400, 3)).astype(np.float32)
    # Fires on all copies of one thing most.
    z[:10, 0] += 1
    naive = win_rate(*top_samples(z, 10), judge)
    by_concept = win_rate(*top_samples(z, 10, groups), judge)
    assert naive[0] > 0.95
    assert by_concept[0] == pytest.approx(0.5, abs=0.15)


def test_a_feature_that_is_a_sample_fires_on_that_samples_nearest_neighbours():
    rng = np.random.default_rng(0)
    e = rng.normal(size=(50, 8)).astype(np.float32) + 3
    z = embedding_features(e, e, 5, seed=1)
    centred = e - e.mean(0)
    drawn = np.random.default_rng(1).permutation(50)[:5]
    for j, sample in enumerate(drawn):
        assert z[:, j] == pytest.approx(centred @ centred[sample], rel=1e-4, abs=1e-4)
    # Without the mean, which all share, it fires on half of the samples and not on all.
    assert 0.3 < (z > 0).mean() < 0.7


def test_emb_sim_is_the_mean_cosine_of_all_pairs():
    judge, z = world()
    samples, enough = top_samples(z, 10)
    scores = emb_sim(samples, enough, judge)
    for j in (0, 7, 15):
        top = judge[samples[j]]
        expected = np.mean([top[i] @ top[k] for i in range(10) for k in range(10) if i != k])
        assert scores[j] == pytest.approx(expected, abs=1e-6)


def test_win_rate_is_the_share_of_comparisons_won_against_random_pairs():
    judge, z = world()
    samples, enough = top_samples(z, 10)
    rates = win_rate(samples, enough, judge, pairs=50_000)
    rng = np.random.default_rng(9)
    for j in (0, 15):
        top = judge[samples[j]]
        wins = []
        for _ in range(400):
            other = judge[rng.choice(N_SAMPLES, 10, replace=False)]
            upper = np.triu_indices(10, 1)
            wins.append(((top @ top.T)[upper] > (other @ other.T)[upper]).mean())
        # The paper's way, repeated 400 times: its mean has a standard error of about 0.004.
        assert rates[j] == pytest.approx(np.mean(wins), abs=0.02)


def test_features_about_one_thing_score_high_and_random_ones_like_the_population():
    judge, z = world()
    samples, enough = top_samples(z, 10)
    similarity, rates = emb_sim(samples, enough, judge), win_rate(samples, enough, judge)
    base = population_similarity(judge)
    assert similarity[:10].min() > base + 0.5
    assert rates[:10].min() > 0.85
    assert abs(similarity[10:].mean() - base) < 0.1
    assert rates[10:].mean() == pytest.approx(0.5, abs=0.05)


def test_features_that_fire_too_rarely_have_no_score():
    judge, z = world()
    z[:, 0] = 0
    z[3, 0] = 1
    samples, enough = top_samples(z, 10)
    assert not enough[0]
    assert np.isnan(emb_sim(samples, enough, judge)[0])
    assert np.isnan(win_rate(samples, enough, judge)[0])


def test_population_similarity_is_the_mean_over_all_pairs():
    judge, _ = world()
    cosines = judge @ judge.T
    expected = cosines[~np.eye(N_SAMPLES, dtype=bool)].mean()
    assert population_similarity(judge) == pytest.approx(expected, abs=1e-5)
    assert random_cosines(judge, 20_000, 0).mean() == pytest.approx(expected, abs=0.02)


@given(st.integers(2, 8), st.integers(0, 1000))
def test_the_mean_cosine_of_equal_vectors_is_one_and_of_a_cross_zero(m, seed):
    u = np.random.default_rng(seed).standard_normal(5)
    u /= np.linalg.norm(u)
    assert mean_pairwise_cosine(np.tile(u, (m, 1))) == pytest.approx(1.0)
    assert mean_pairwise_cosine(np.eye(m)) == pytest.approx(0.0)


def test_a_mean_over_features_leaves_out_the_undefined_and_brackets_itself():
    scores = np.concatenate([np.random.default_rng(0).random(200), [np.nan] * 5])
    mean = mean_over_features(scores)
    assert mean.features == 200
    assert mean.low < mean.mean < mean.high
    # Standard error of a uniform's mean over 200: 0.289 / sqrt(200) = 0.0204, so 95% is 0.08 wide.
    assert mean.high - mean.low == pytest.approx(0.08, rel=0.15)
    assert mean_over_features(np.array([np.nan])).features == 0
