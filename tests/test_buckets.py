"""Buckets: they hold every row, more of them never pad more, and batches cut by them lose nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.data.buckets import bounds, cut, padding, rounded, smallest

sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=60).map(np.array)


def slots(need_N2: np.ndarray, buckets: int) -> float:
    """What is padded to, each axis as a share of the largest."""
    bound_B2 = bounds(need_N2, buckets)
    return float((bound_B2[smallest(need_N2, bound_B2)] / need_N2.max(axis=0)).sum())


@settings(deadline=None)
@given(sizes, st.integers(1, 6))
def test_every_row_has_a_bucket_and_more_buckets_pad_less(size_N2, buckets):
    need_N2 = rounded(size_N2, (16, 64), (300, 192))
    bound_B2 = bounds(need_N2, buckets)
    assert len(bound_B2) <= buckets and (bound_B2[-1] == need_N2.max(axis=0)).all()
    bucket_N = smallest(need_N2, bound_B2)
    assert (bound_B2[bucket_N] >= need_N2).all() and len(np.unique(bound_B2, axis=0)) == len(bound_B2)
    assert slots(need_N2, buckets) <= slots(need_N2, max(buckets - 1, 1)) + 1e-9


@settings(deadline=None)
@given(sizes, st.integers(1, 6), st.integers(1, 9))
def test_batches_have_every_row_once(size_N2, buckets, prompts):
    bound_B2 = bounds(np.maximum(size_N2, 1), buckets)
    bucket_N = smallest(np.maximum(size_N2, 1), bound_B2)
    place_KP, bucket_K = cut(bucket_N, bound_B2, prompts)
    assert place_KP.shape == (-(-len(size_N2) // prompts), prompts) and (np.diff(bucket_K) >= 0).all()
    places = place_KP[place_KP >= 0]
    assert sorted(places.tolist()) == list(range(len(size_N2))) and (place_KP[:-1] >= 0).all()
    for place_P, bucket in zip(place_KP, bucket_K, strict=True):
        assert (size_N2[place_P[place_P >= 0]] <= bound_B2[bucket]).all()
    mixed = sum(len(set(bucket_N[place_P[place_P >= 0]])) > 1 for place_P in place_KP)
    assert mixed <= len(bound_B2) - 1 and (place_KP[-1] < 0).any() == bool(len(size_N2) % prompts)


def test_one_bucket_keeps_the_order():
    place_KP, bucket_K = cut(np.zeros(7, int), np.array([[8, 8]]), 3)
    assert place_KP.tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]] and bucket_K.tolist() == [0, 0, 0]


def test_what_is_left_over_goes_where_it_fits():
    """A long text fits no bucket of short texts with pictures."""
    bound_B2 = np.array([[100, 64], [40, 256], [100, 256]])
    place_KP, bucket_K = cut(np.array([1, 0, 2, 0, 1, 0, 1]), bound_B2, 2)
    assert place_KP.tolist() == [[1, 3], [0, 4], [6, 5], [2, -1]] and bucket_K.tolist() == [0, 1, 2, 2]


def test_the_buckets_that_pad_least():
    tokens = np.array([[9], [10], [12], [30], [31], [100], [101]])
    need = rounded(tokens, (8,), (200,))
    assert [bounds(need, n).ravel().tolist() for n in (1, 3, 9)] == [[104], [16, 32, 104], [16, 32, 104]], "more would save nothing"
    texts_and_pictures = np.array([[300, 64]] * 5 + [[100, 256]] * 5)
    assert bounds(texts_and_pictures, 3).tolist() == [[300, 64], [100, 256], [300, 256]]
    assert padding(np.array([[30, 0], [90, 64]]), np.array([[60, 64], [100, 64]])) == [0.25, 0.5]
