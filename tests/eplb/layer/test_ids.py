"""Ids of experts that are unknown or repeated."""

import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.layer.ids import is_repeated, known_ids, merge_repeated


@pytest.mark.parametrize(
    ("dtype", "num_ids", "unknown"),
    [
        ("int32", 4, [-1, -9, 4, 2**31 - 1, -(2**31)]),
        ("int8", 200, [-1, -128]),  # its largest number is 127
        ("uint8", 200, [200, 255]),
        ("uint32", 4, [4, 2**31, 2**32 - 1]),
    ],
)
def test_unknown_ids_of_every_dtype(dtype, num_ids, unknown):
    known = [0, 3]
    ids = known_ids(np.array([[*known, *unknown]], dtype), num_ids)
    assert ids.dtype == jnp.int32
    assert ids.tolist() == [[*known, *[-1] * len(unknown)]]


def test_merged_choices_have_the_same_weight_for_each_expert():
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 3, (50, 4))
    weights = np.where(ids < 0, 0, rng.integers(1, 9, ids.shape)).astype(np.float32)
    merged, sums = map(np.asarray, merge_repeated(jnp.asarray(ids), weights))
    for token in range(len(ids)):
        kept = merged[token][merged[token] >= 0].tolist()
        assert sorted(kept) == sorted(set(ids[token].tolist()) - {-1})
        for expert in kept:
            (found,) = sums[token][merged[token] == expert]
            assert found == weights[token][ids[token] == expert].sum()
    assert not sums[merged < 0].any()
    # The first of equal choices stays where it is.
    assert (merged[:, 0] == ids[:, 0]).all() and not is_repeated(ids)[:, 0].any()
