"""The schedule of decoding: every answer runs once, in its own prompt's row, from its first token to its last."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.generate.lanes import Slots, advance, empty, take_answers, take_prompts

P, G, STEPS = 8, 3, 8 * 3 * 7


@functools.partial(jax.jit, static_argnames=("rows", "lanes", "shards"))
def run(length_PG, rows, lanes, shards):
    """The schedule before each of STEPS steps, stacked, and the slots."""
    length_WPG = length_PG.reshape(shards, -1, G)
    shard_N = jnp.repeat(jnp.arange(shards), rows // shards)

    def step(carry, _):
        schedule, slots = carry
        schedule, _ = take_answers(take_prompts(schedule))
        length_NS = length_WPG[shard_N[:, None], jnp.minimum(schedule.prompt_N, P // shards - 1)[:, None], schedule.sample_NS]
        after = advance(schedule, schedule.offset_NS + 1 >= length_NS)
        running = schedule.busy_NS.any()
        slots = jax.tree.map(lambda new, old: jnp.where(running, new, old), slots.count(schedule), slots)
        return (after, slots), schedule

    (last, slots), seen = jax.lax.scan(step, (empty(P, G, rows, lanes, shards), Slots.none()), None, STEPS)
    return seen, slots, last


@pytest.mark.parametrize(("rows", "lanes", "shards"), [(8, 3, 1), (3, 2, 1), (1, 1, 1), (4, 2, 4)])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=P * G, max_size=P * G))
def test_every_answer_runs_once(rows, lanes, shards, lengths):
    length_PG = np.array(lengths, np.int32).reshape(P, G)
    seen, slots, last = jax.tree.map(np.asarray, run(length_PG, rows, lanes, shards))
    per_shard = P // shards
    tokens = np.zeros((P, G, 7), int)
    times = np.zeros((P, G, 7), int)
    for time, row, lane in zip(*np.nonzero(seen.busy_NS), strict=True):
        prompt = row // (rows // shards) * per_shard + seen.prompt_N[time, row]
        at = prompt, seen.sample_NS[time, row, lane], seen.offset_NS[time, row, lane]
        tokens[at] += 1
        times[at] = time
    np.testing.assert_array_equal(tokens, np.arange(7) < length_PG[..., None])
    inside = tokens[..., 1:] > 0
    assert (np.diff(times, axis=-1)[inside] == 1).all()  # without a pause: a ring's slots are those of consecutive steps
    assert slots.used.sum() == length_PG.sum() and (slots.used <= slots.computed).all()
    assert not last.busy_NS.any() and last.finished_N.all() and not last.refill
    # A lane stands idle before the tail only where its row has given out all of its group.
    idle = ~seen.busy_NS & (seen.begun_N < G)[..., None]
    assert not idle.any()


def test_waste_counts_slots_for_tokens():
    """Two rows of one lane with 48 and 12 tokens to give: the second stands idle for the last 36 steps, which are the tail."""
    _, slots, _ = run(np.array([[4, 4, 4]] * 4 + [[1, 1, 1]] * 4, np.int32), 2, 1, 2)
    before, whole = slots.waste()
    assert float(before) == 1.0 and float(whole) == pytest.approx(2 * 48 / 60)
