"""The attention kernels equal plain attention, run interpreted; they compile for a TPU and lower for a GPU where there is neither."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pgjax.models.attention import attend
from pgjax.models.flash import Pairs, backward_gpu, backward_tpu, forward_gpu, forward_tpu

BACKENDS = {"tpu": (forward_tpu, backward_tpu), "gpu": (forward_gpu, backward_gpu)}
BLOCK = 32


def layout(seed: int, size: int) -> np.ndarray:
    """Random tokens [3, size]: prompts with answers of unequal length, and pictures, of any size, at any place; empty slots between."""
    rng, tokens, group = np.random.default_rng(seed), [], 0
    while len(tokens) < size:
        tokens += [(-1, -1, 0)] * rng.integers(0, 4)
        length = rng.choice([1, 7, BLOCK, 2 * BLOCK + 5])
        if rng.random() < 0.3:  # a picture: every patch sees every other
            tokens += [(group, -1, 0)] * length
        else:
            tokens += [(group, -1, t) for t in range(length)]
            tokens += [(group, s, length + t) for s in range(rng.integers(0, 4)) for t in range(rng.choice([1, 5, 40]))]
        group += 1
    return np.array(tokens[:size], np.int32).T


def mask_of(ids: np.ndarray) -> np.ndarray:
    """Who sees whom, written out entry by entry."""
    seen = np.zeros((ids.shape[1],) * 2, bool)
    for i, (group, sample, order) in enumerate(ids.T):
        for j, (group_j, sample_j, order_j) in enumerate(ids.T):
            seen[i, j] = group >= 0 and group == group_j and sample_j in (-1, sample) and order_j <= order
    return seen


def pairs_of(seen: np.ndarray, size: int | None) -> list[Pairs]:
    """The live pairs of blocks and every diagonal one, by query block and by key block; the last is repeated up to `size` entries."""
    n = seen.shape[0] // BLOCK
    live = seen.reshape(n, BLOCK, n, BLOCK).any((1, 3)) | np.eye(n, dtype=bool)
    count, both = live.sum(), (np.argwhere(live), np.argwhere(live.T)[:, ::-1])
    padded = [np.concatenate([pairs, np.repeat(pairs[-1:], (size or count) - count, axis=0)]) for pairs in both]
    return [Pairs(*jnp.asarray(pairs.T, jnp.int32), jnp.int32(count)) for pairs in padded]


@jax.jit
def plain(q, k, v, do, seen):
    """Output and gradients of dense attention in float32; a query that sees nothing gives 0."""

    def dense(q, k, v):
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        score = jnp.einsum("ihc,jhc->hij", q, k, precision="highest") * q.shape[-1] ** -0.5
        weight = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, -1e9), axis=-1), 0.0)
        return jnp.einsum("hij,jhc->ihc", weight, v, precision="highest")

    out, pull = jax.vjp(dense, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, *pull(do.astype(jnp.float32))


@partial(jax.jit, static_argnames="backend")
def kernels(backend, q, k, v, do, ids, by_query, by_key):
    forward, backward = BACKENDS[backend]
    o, lse = forward(q, k, v, ids, by_query, BLOCK, interpret=True)
    delta = jnp.einsum("nhc,nhc->hn", do.astype(jnp.float32), o.astype(jnp.float32))
    return o, *backward(q, k, v, ids, delta, lse, do, by_query, by_key, BLOCK, interpret=True)


def check(backend, seed, shape, size, dtype, tolerance):
    (N, H, K, C), keys = shape, jax.random.split(jax.random.key(seed), 4)
    q, k, v, do = (jax.random.normal(key, (N, heads, C), dtype) for key, heads in zip(keys, (H, K, K, H), strict=True))
    ids = layout(seed, N)
    seen = mask_of(ids)
    got, wanted = kernels(backend, q, k, v, do, ids, *pairs_of(seen, size)), plain(q, k, v, do, seen)
    empty = ids[0] < 0
    assert empty.any() and not any(np.asarray(x, np.float32)[empty].any() for x in got)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(192, 4, 2, 16), (96, 3, 1, 80)], ids=str)
def test_kernels_equal_plain_attention(backend, shape):
    for seed in range(4):
        check(backend, seed, shape, (shape[0] // BLOCK) ** 2, jnp.float32, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_in_bfloat16_with_lists_of_live_pairs_alone(backend):
    check(backend, 5, (128, 2, 2, 16), None, jnp.bfloat16, 0.05)


FULL_SIZE = [(8192, 28, 4, 128), (4096, 16, 16, 80)]  # the language model's attention and a vision tower's


def calls(backend: str, shape, block: int, sharding=None):
    """Forward and backward in bfloat16, jitted, with the shapes of their arguments."""

    def like(*axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=sharding)

    (N, H, K, C), (forward, backward) = shape, BACKENDS[backend]
    q, k = like(N, H, C, dtype=jnp.bfloat16), like(N, K, C, dtype=jnp.bfloat16)
    M = N // block * (N // block + 1) // 2
    pairs, ids, row = Pairs(like(M), like(M), like()), like(3, N), like(H, N, dtype=jnp.float32)
    yield jax.jit(lambda *args: forward(*args, block)), (q, k, k, ids, pairs), 1
    yield jax.jit(lambda *args: backward(*args, block)), (q, k, k, ids, row, row, q, pairs, pairs), 2


@pytest.mark.parametrize("shape", FULL_SIZE, ids=str)
def test_gpu_kernels_lower_without_a_gpu(shape):
    for call, args, kernels in calls("gpu", shape, block=64):
        text = call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@__gpu$xla.gpu.triton") == kernels


def whole_attention(platform: str, sharding=None):
    """Attention of rows and its gradients on a platform; jitted, with the shapes of its arguments."""
    rows, slots = 2, 5000  # not a multiple of any block

    def like(*axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=sharding)

    q, k = like(rows, slots, 28, 128, dtype=jnp.bfloat16), like(rows, slots, 4, 128, dtype=jnp.bfloat16)
    total = lambda q, k, v, ids: attend(q, k, v, ids, platform).astype(jnp.float32).sum()  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1, 2))), (q, k, k, like(3, rows, slots))


def test_attention_takes_the_kernels_on_a_gpu():
    call, args = whole_attention("gpu")
    text = call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3


def compile_for_tpu():
    """Compiles for one chip of a TPU v5e that is only described. The arrays of a pair of blocks are all that comes and goes:
    whole scores would take gigabytes."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    for shape in FULL_SIZE:
        for call, args, kernels in calls("tpu", shape, block=512, sharding=SingleDeviceSharding(chip)):
            compiled = call.lower(*args).compile()
            assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
            assert compiled.memory_analysis().peak_memory_in_bytes < 400 << 20
    call, args = whole_attention("tpu", SingleDeviceSharding(chip))
    assert call.lower(*args).compile().as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (the extra tpu)")
def test_tpu_kernels_compile_without_a_tpu():
    described = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    described |= {"TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}  # read when JAX starts
    done = subprocess.run([sys.executable, __file__], env=os.environ | described, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    compile_for_tpu()
