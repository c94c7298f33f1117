import numpy as np

from training.bias.counterparts import differences, subspace

SUBJECTS, DIM = 120, 16


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Subjects as woman and man along one direction, women drawn mostly by a hand with a mark of its own."""
    rng = np.random.default_rng(seed)
    gender, mark = np.linalg.qr(rng.standard_normal((DIM, 2)))[0].T
    subject = np.repeat(np.arange(SUBJECTS), 2)
    woman = np.tile([True, False], SUBJECTS)
    e = np.repeat(rng.standard_normal((SUBJECTS, DIM)), 2, axis=0)
    e += np.where(woman, 0.5, -0.5)[:, None] * gender + 0.05 * rng.standard_normal(e.shape)
    # Women without a counterpart, all by the marked hand: a difference of class means takes up the mark.
    alone = rng.standard_normal((SUBJECTS, DIM)) + 4.0 * mark + 0.5 * gender
    e = np.concatenate([e, alone])
    woman = np.concatenate([woman, np.ones(SUBJECTS, bool)])
    subject = np.concatenate([subject, SUBJECTS + np.arange(SUBJECTS)])
    return e.astype(np.float32), woman, subject, gender


def test_only_subjects_of_both_genders_make_a_difference():
    e, woman, subject, _ = planted()
    found = differences(e, woman, subject)
    assert found.shape == (SUBJECTS, DIM)
    np.testing.assert_allclose(found[7], e[14].astype(float) - e[15])


def test_the_first_direction_is_gender_where_the_class_means_differ_in_something_else():
    e, woman, subject, gender = planted()
    first = subspace(e, woman, subject)[0]
    # Noise of 0.05 in each dimension over 120 pairs that differ by 1: well under a degree.
    assert abs(first @ gender) > 0.99
    means = e[woman].mean(0) - e[~woman].mean(0)
    assert abs(means @ gender) / np.linalg.norm(means) < 0.6


def test_directions_are_orthonormal_and_no_more_than_pairs():
    e, woman, subject, _ = planted()
    few = subspace(e[:6], woman[:6], subject[:6], size=4)
    # Rounding to float32.
    np.testing.assert_allclose(few @ few.T, np.eye(3), atol=1e-6)
