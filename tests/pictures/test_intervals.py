"""Arithmetic of intervals."""

from dualpipe_jax.pictures import intersection, length, union


def test_intervals():
    some = union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)])
    assert some == [(0, 2.5), (3, 4)]
    assert length(some) == 3.5
    assert intersection(some, [(1, 3.5)]) == [(1, 2.5), (3, 3.5)]
    assert intersection(some, []) == []
