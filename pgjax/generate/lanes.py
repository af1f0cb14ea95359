"""Which answer runs where: the lanes that decoding works through.

N rows of S lanes each stand on W shards of the batch, N / W on each. A row holds one prompt of its shard at a time, its lanes that
prompt's answers: a lane whose answer ends takes the next of the group, a row whose group ends the next prompt of the shard. So a
batch of P groups with G answers needs neither P rows nor G lanes, and short answers do not wait for long ones. Shapes are static.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Schedule:
    prompt_N: jax.Array  # int32: the row's prompt, as numbered in its shard; P / W: none
    begun_N: jax.Array  # int32: how many of its answers have been given a lane
    sample_NS: jax.Array  # int32: which answer the lane holds
    offset_NS: jax.Array  # int32: tokens that it has
    busy_NS: jax.Array  # bool
    queue_W: jax.Array  # int32: first prompt of the shard that no row has taken
    prompts: int = struct.field(pytree_node=False)  # P / W
    group: int = struct.field(pytree_node=False)  # G

    @property
    def finished_N(self) -> jax.Array:
        """Rows with nothing left to do."""
        return ~self.busy_NS.any(axis=1) & (self.begun_N >= self.group)

    @property
    def refill(self) -> jax.Array:
        """Whether some row can take a prompt now."""
        waiting_W = self.queue_W < self.prompts
        return (waiting_W[:, None] & self.finished_N.reshape(len(self.queue_W), -1)).any()


def empty(prompts: int, group: int, rows: int, lanes: int, shards: int) -> Schedule:
    """Every row ready to take a prompt. `prompts` P and `rows` N are divided by `shards` W."""
    zeros = jnp.zeros((rows, lanes), jnp.int32)
    none, begun = (jnp.full(rows, number, jnp.int32) for number in (prompts // shards, group))
    return Schedule(none, begun, zeros, zeros, zeros > 0, jnp.zeros(shards, jnp.int32), prompts // shards, group)


def take_prompts(s: Schedule) -> Schedule:
    """Finished rows take the next prompts of their shard, or none."""
    free_WN = s.finished_N.reshape(len(s.queue_W), -1)
    next_N = (s.queue_W[:, None] + jnp.cumsum(free_WN, axis=1) - 1).reshape(-1)
    free_N = free_WN.reshape(-1)
    return s.replace(
        prompt_N=jnp.where(free_N, jnp.minimum(next_N, s.prompts), s.prompt_N),
        begun_N=jnp.where(free_N & (next_N < s.prompts), 0, s.begun_N),
        queue_W=jnp.minimum(s.queue_W + free_WN.sum(axis=1, dtype=jnp.int32), s.prompts),
    )


def take_answers(s: Schedule) -> tuple[Schedule, jax.Array]:
    """Free lanes take the next answers of their row's prompt; also which lanes did, bool [N, S]."""
    free_NS = ~s.busy_NS
    next_NS = s.begun_N[:, None] + jnp.cumsum(free_NS, axis=1, dtype=jnp.int32) - 1
    fresh_NS = free_NS & (next_NS < s.group)
    s = s.replace(
        begun_N=s.begun_N + fresh_NS.sum(axis=1, dtype=jnp.int32),
        sample_NS=jnp.where(fresh_NS, next_NS, s.sample_NS),
        offset_NS=jnp.where(fresh_NS, 0, s.offset_NS),
        busy_NS=s.busy_NS | fresh_NS,
    )
    return s, fresh_NS


def advance(s: Schedule, ended_NS: jax.Array) -> Schedule:
    """Every busy lane has one token more; the answers in `ended_NS` end with it."""
    return s.replace(offset_NS=s.offset_NS + s.busy_NS, busy_NS=s.busy_NS & ~ended_NS)


@struct.dataclass
class Slots:
    """Lane slots computed, and those of them that gave a token, before the tail and in it: int32 [2] each. The tail begins when a
    row has nothing left to do."""

    computed: jax.Array
    used: jax.Array

    @classmethod
    def none(cls) -> "Slots":
        return cls(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))

    def count(self, s: Schedule) -> "Slots":
        """With one more step of the schedule."""
        tail = s.finished_N.any().astype(jnp.int32)
        return Slots(self.computed.at[tail].add(s.busy_NS.size), self.used.at[tail].add(s.busy_NS.sum(dtype=jnp.int32)))

    def waste(self) -> tuple[jax.Array, jax.Array]:
        """Slots computed for each token: before the tail, and in all."""
        ratio = lambda computed, used: computed / jnp.maximum(used, 1)  # noqa: E731
        return ratio(self.computed[0], self.used[0]), ratio(self.computed.sum(), self.used.sum())
