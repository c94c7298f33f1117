from __future__ import annotations

import numpy as np

from training.build.selection import first_of, hashed, parts_of

NAMES = np.array([f"image {i}" for i in range(20_000)], dtype=object)
SILENT = np.full(len(NAMES), "")


def test_the_split_is_the_same_whatever_else_there_is() -> None:
    part, order = parts_of(NAMES, SILENT)
    some = np.random.default_rng(0).permutation(len(NAMES))[:500]
    again, order_again = parts_of(NAMES[some], SILENT[some])
    assert (again == part[some]).all()
    assert (order_again == order[some]).all()


def test_the_split_has_its_shares() -> None:
    part, _ = parts_of(NAMES, SILENT)
    expected = {"fit": 0.68, "pool": 0.12, "validation": 0.1, "test": 0.1}
    for name, share in expected.items():
        # Five standard errors of a share over 20,000 independent draws.
        assert abs((part == name).mean() - share) < 5 * (share * (1 - share) / len(NAMES)) ** 0.5


def test_a_known_hash_keeps_its_place() -> None:
    # SHA-256 of "abc" begins ba7816bf 8f01cfea 414140de 5dae2223; its first 53 bits over 2^53.
    assert hashed(np.array(["abc"]))[0, 0] == (0xBA7816BF8F01CFEA >> 11) / 2**53


def test_a_pair_that_says_its_split_is_taken_at_its_word() -> None:
    part, _ = parts_of(NAMES[:300], np.full(300, "train"))
    assert set(part) == {"fit", "pool"}
    assert set(parts_of(NAMES[:300], np.full(300, "test"))[0]) == {"test"}


def test_a_limit_takes_the_same_pairs_when_it_grows() -> None:
    part, order = parts_of(NAMES, SILENT)
    few = first_of(part, order, {"fit": 100, "test": 50})
    more = first_of(part, order, {"fit": 200, "test": 50})
    assert len(few) == 150
    assert set(few) < set(more)
    assert (np.diff(few) > 0).all()
