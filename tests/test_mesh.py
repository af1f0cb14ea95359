"""The mesh and its rules, and that the model computes the same on every mesh."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden.make_qwen import write_checkpoint
from jax.sharding import PartitionSpec
from tiny_qwen import QUICK, abstract_params, golden, inputs, tiny_model

from pgjax.config import MeshConfig
from pgjax.models.checkpoint import load_params
from pgjax.models.qwen_vl import init_boxed
from pgjax.parallel.mesh import (
    ROLLOUT,
    TRAINING,
    Share,
    constrain,
    local_rows,
    make_mesh,
    param_shardings,
    place_rows,
    rows,
    shares_of,
    spec,
)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, -1, 1), (-2, 1, 1), (4, 4, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices: the product must be 8"):
        make_mesh(MeshConfig(*sizes))


def test_mesh_sizes():
    assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(1, -1, 1)).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1
    with pytest.raises(ValueError, match="does not fit 2 devices"):
        make_mesh(MeshConfig(8, 1, 1), jax.devices()[:2])


def test_rules():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert spec(("embed", "heads", None), (8, 4, 5), TRAINING, mesh) == PartitionSpec("fsdp", "tensor", None)
    assert spec(("embed", "heads", None), (8, 4, 5), ROLLOUT, mesh) == PartitionSpec(None, "tensor", None)
    assert spec(("batch", None), (8, 3), TRAINING, mesh) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("embed", "kv_heads"), (8, 3), TRAINING, mesh) == PartitionSpec("fsdp", None)  # 3 heads over 2: replicated
    assert spec(("batch",), (6,), TRAINING, mesh) == PartitionSpec(None)
    with pytest.raises(KeyError, match="no rule for logical axis 'embde'; known axes: batch, "):
        spec(("embde",), (8,), TRAINING, mesh)
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x  # no mesh, no constraint


def test_rows_are_placed_and_read_back():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    batch = {"even": np.arange(24).reshape(8, 3), "odd": np.arange(3)}
    placed = place_rows(batch, mesh)
    assert placed["even"].sharding.is_equivalent_to(rows(mesh), 2) and placed["odd"].sharding.is_fully_replicated
    for name, array in batch.items():
        np.testing.assert_array_equal(local_rows(placed[name]), array)


def described(process_WT) -> SimpleNamespace:
    """A mesh of devices that are only described by the process which they belong to."""
    devices = np.vectorize(lambda process: SimpleNamespace(process_index=process), otypes=[object])(process_WT)[None]
    return SimpleNamespace(devices=devices, shape=dict(zip(("data", "fsdp", "tensor"), devices.shape, strict=True)))


def test_processes_have_the_shards_of_their_devices():
    rows = np.arange(16).reshape(8, 2)
    assert shares_of(described([[0], [0], [1], [1]])) == {0: Share((0, 1), 4), 1: Share((2, 3), 4)}
    assert shares_of(described([[0], [1], [0], [1]])) == {0: Share((0, 2), 4), 1: Share((1, 3), 4)}
    assert shares_of(described([[0, 1], [0, 1]])) == {0: Share((0, 1), 2), 1: Share((0, 1), 2)}  # as tensor lies on a v5e pod
    np.testing.assert_array_equal(Share((1, 3), 4).of(rows), rows[[2, 3, 6, 7]])
    np.testing.assert_array_equal(Share((0, 1), 2).of(rows[:3]), rows[:3])
    with pytest.raises(ValueError, match="3 rows do not divide over the 2 shards"):
        Share((1,), 2).of(rows[:3])


REMAT = {(1, 1, 1): "none", (8, 1, 1): "attention", (1, 8, 1): "dots"}


def logits_and_gradients(sizes, path, batch, weight):
    """On one mesh. Each keeps something else for the backward pass, so that this is compared as well."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model = tiny_model(path, remat=REMAT.get(sizes, "full"))
    params = load_params(path, *abstract_params(model, mesh))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, batch, weight):
        def loss(params):
            logits = model.apply({"params": params}, *batch)
            return jnp.sum(jax.nn.log_softmax(logits) * weight), logits

        return jax.grad(loss, has_aux=True)(params)

    with jax.set_mesh(mesh):
        grads, logits = run(params, place_rows(batch, mesh), place_rows(weight, mesh))
    return jax.tree.map(np.asarray, (logits, grads))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Checkpoint, batch of 8 rows, loss weights, and what one device computes of them."""
    arrays, path = golden("tied"), tmp_path_factory.mktemp("mesh")
    write_checkpoint(path, json.loads(str(arrays["config"])), json.loads(str(arrays["shapes"])))
    batch = [np.concatenate([x, x[::-1]]) for x in inputs(arrays)]
    real = np.arange(batch[4].shape[1]) < batch[-1][:, None]
    weight = np.random.default_rng(0).normal(size=(*real.shape, arrays["logits"].shape[-1])).astype(np.float32)
    weight *= real[..., None]
    return path, batch, weight, real, logits_and_gradients((1, 1, 1), path, batch, weight)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_model_is_the_same_on_every_mesh(sizes, single):
    path, batch, weight, real, (expected, expected_grads) = single
    logits, grads = logits_and_gradients(sizes, path, batch, weight)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest), grads, expected_grads)


def test_parameters_are_born_sharded(single):
    """Fresh and loaded parameters lie as the rules say, and no device holds a whole sharded one."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = tiny_model(single[0])
    abstract, shardings = abstract_params(model, mesh)
    init = jax.jit(lambda key: nn.meta.unbox(init_boxed(model, key)), out_shardings=shardings, compiler_options=QUICK)
    for params in (init(jax.random.key(0)), load_params(single[0], abstract, shardings)):
        jax.tree.map(lambda x, a, s: (x.shape, x.sharding) == (a.shape, s) or pytest.fail(str(a)), params, abstract, shardings)
        q = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]  # [L, D, H, C]
        assert q.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
        L, D, H, C = q.shape
        assert {shard.data.shape for shard in q.addressable_shards} == {(L, D // 2, H // 2, C)}
    for rules, axis in ((TRAINING, "fsdp"), (ROLLOUT, None)):
        boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
        assert param_shardings(boxed, rules, mesh)["model"]["embed_tokens"]["embedding"].spec == PartitionSpec("tensor", axis)
