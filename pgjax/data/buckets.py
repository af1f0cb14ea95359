"""Buckets: the few shapes that prompts are padded to, and batches of rows of one bucket each.

A row takes so much along each axis (prompt tokens, slots for patches); a bucket holds so much. Which rows a batch has, and which bucket
it is, is known from stored sizes before anything is loaded: every process cuts the same batches and makes its own slice of them.

Axes: N rows, B buckets, K batches of P rows, D = 2 sizes.
"""

from itertools import product

import numpy as np


def rounded(size_ND: np.ndarray, step_D: tuple[int, ...], most_D: tuple[int, ...]) -> np.ndarray:
    """Sizes up to the next multiple of each step, at least one, at most `most_D`."""
    return np.minimum(-(-np.maximum(size_ND, 1) // np.array(step_D)) * np.array(step_D), most_D)


def bounds(need_ND: np.ndarray, buckets: int) -> np.ndarray:
    """At most so many buckets [B, D], cheapest first: the one that holds all rows, then one by one those that save the most padding.

    A bucket's price is the sum of its shares of the largest one, so that padding counts the same along each axis.
    """
    kind_UD, count_U = np.unique(need_ND, axis=0, return_counts=True)
    largest_D = kind_UD.max(axis=0)
    price = lambda bound: (np.asarray(bound) / largest_D).sum(axis=-1)  # noqa: E731
    found = largest_D[None]
    choices = list(product(*(np.unique(size_U) for size_U in kind_UD.T)))
    for _ in range(buckets - 1):
        now_U = price(found[smallest(kind_UD, found)])
        saved = lambda bound: (count_U * np.maximum(now_U - price(bound), 0))[(kind_UD <= bound).all(axis=1)].sum()  # noqa: B023, E731
        best = max(choices, key=saved)
        if saved(best) <= 0:
            break
        found = np.array(sorted([*found.tolist(), best], key=price))
    return found


def smallest(need_ND: np.ndarray, bound_BD: np.ndarray) -> np.ndarray:
    """Of each row the first bucket that holds it, [N]."""
    return (need_ND[:, None] <= bound_BD).all(axis=2).argmax(axis=1)


def cut(bucket_N: np.ndarray, bound_BD: np.ndarray, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches [K, P] of places in `bucket_N`, and their buckets [K]. Rows of a bucket keep their order; what it has left over, which
    fills no batch, moves up to the next bucket that holds it, before that one's own. The last batch is filled up with -1.
    """
    places_KP, buckets, last = [], [], len(bound_BD) - 1
    waiting = [np.flatnonzero(bucket_N == bucket) for bucket in range(len(bound_BD))]
    for bucket, places in enumerate(waiting):
        if bucket == last:
            places = np.append(places, np.full(-len(places) % prompts, -1))
        whole = len(places) // prompts * prompts
        places_KP.append(places[:whole].reshape(-1, prompts))
        buckets += [bucket] * len(places_KP[-1])
        if bucket < last:
            above = bucket + 1 + (bound_BD[bucket + 1 :] >= bound_BD[bucket]).all(axis=1).argmax()
            waiting[above] = np.append(places[whole:], waiting[above])
    return np.concatenate(places_KP), np.array(buckets)


def padding(size_ND: np.ndarray, bound_ND: np.ndarray) -> list[float]:
    """The empty share along each axis."""
    return (1 - size_ND.sum(axis=0) / bound_ND.sum(axis=0)).tolist()
