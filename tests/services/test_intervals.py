from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from services.intervals import area_under_roc, exact_end


@pytest.mark.parametrize("units", [1, 2, 10, 64, 1000])
def test_the_end_is_clopper_and_pearsons(units):
    assert 1 - exact_end(units) == pytest.approx(binomtest(units, units).proportion_ci(method="exact").low)
    assert exact_end(units) == pytest.approx(binomtest(0, units).proportion_ci(method="exact").high)


def test_64_of_64_is_94_to_100_percent_and_nothing_of_nothing_says_nothing():
    assert 1 - exact_end(64) == pytest.approx(0.944, abs=5e-4)
    assert exact_end(0) == 1


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_the_area_is_scikit_learns_with_ties(seed):
    rng = np.random.default_rng(seed)
    score, positive = rng.integers(0, 4, 25).astype(float), rng.random(25) < 0.4
    area = area_under_roc(score, positive)
    if positive.all() or not positive.any():
        assert np.isnan(area.value)
    else:
        assert area.value == pytest.approx(roc_auc_score(positive, score))
        assert area.low <= area.value <= area.high
        assert area.units == positive.sum()


def test_an_area_of_one_is_as_sure_as_its_positives_are_many():
    """Two captions with an AUC of 1.00 say next to nothing."""
    for positives, low in ((2, 0.158), (64, 0.944)):
        score = np.concatenate([np.ones(positives), np.zeros(100)])
        area = area_under_roc(score, score > 0)
        assert (area.value, area.high, area.units) == (1.0, 1.0, positives)
        assert area.low == pytest.approx(low, abs=1e-3)


def test_copies_of_the_same_items_do_not_make_the_interval_narrower():
    rng = np.random.default_rng(0)
    score = np.concatenate([rng.normal(1, 1, 20), rng.normal(0, 1, 60)])
    positive = np.arange(80) < 20
    once = area_under_roc(score, positive)
    copied = area_under_roc(np.tile(score, 9), np.tile(positive, 9), np.tile(np.arange(80), 9))
    assert [copied.value, copied.low, copied.high] == pytest.approx([once.value, once.low, once.high])
    assert copied.units == 20
    naive = area_under_roc(np.tile(score, 9), np.tile(positive, 9))
    # Nine copies shrink an interval by 3, and the t quantile of 19 degrees of freedom is 7% larger.
    assert (once.high - once.low) / (naive.high - naive.low) == pytest.approx(3.2, rel=0.1)


def test_the_interval_holds_the_true_area_about_as_often_as_it_says():
    """Groups of four share half of their variance; the true area is Phi(1 / sqrt(2))."""
    rng = np.random.default_rng(0)
    truth, covered, trials = 0.7602, 0, 400
    groups = np.repeat(np.arange(40), 4)
    positive = groups < 15
    for _ in range(trials):
        score = np.sqrt(0.5) * (rng.normal(size=40)[groups] + rng.normal(size=160)) + positive
        area = area_under_roc(score, positive, groups)
        covered += area.low <= truth <= area.high
    # A standard error of 1.1%.
    assert covered / trials == pytest.approx(0.95, abs=0.035)
