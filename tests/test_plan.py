"""The plan: what is counted against programs whose work is known, the walk through a step, and `pgjax plan` for TPUs where libtpu is."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_recipe as tiny
from drill_runs import write_config
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from pgjax.cli import main
from pgjax.config import MeshConfig
from pgjax.grpo.programs import Judge
from pgjax.parallel.mesh import make_mesh
from pgjax.plan.chips import CHIPS, parse_topology
from pgjax.plan.count import Move, collectives, flops, moves
from pgjax.plan.plan import largest
from pgjax.plan.table import table
from pgjax.plan.walk import chip_bytes, walk
from pgjax.train.flops import PEAKS

MESH = (2, 2, 2)


def jaxpr(f, *args):
    return jax.make_jaxpr(f)(*args).jaxpr


def test_flops_count_a_body_as_often_as_it_runs():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    one = 2 * 3 * 4 * 4
    assert flops(jaxpr(jnp.dot, x, w)) == one
    scanned = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]  # noqa: E731
    unrolled = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5, unroll=True)[0]  # noqa: E731
    assert flops(jaxpr(scanned, x, w)) == 5 * one == jax.jit(unrolled).lower(x, w).compile().cost_analysis()["flops"]
    assert flops(jaxpr(jax.jit(jax.checkpoint(scanned)), x, w)) == 5 * one
    either = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)  # noqa: E731
    assert flops(jaxpr(either, x, w)) == 2 * one
    until = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: scanned(x, w), x)  # noqa: E731
    assert flops(jaxpr(until, x, w), (7,)) == 35 * one


def test_collectives_count_a_body_as_often_as_it_runs():
    mesh = make_mesh(MeshConfig(*MESH))
    split = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    x, w = (jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=at) for at in (split(None, "tensor"), split("tensor")))

    def summed(x, w):  # the sum over tensor of a product of halves, five times
        return jax.lax.scan(lambda x, _: (jax.lax.with_sharding_constraint(x @ w, split(None, "tensor")), None), x, length=5)[0]

    hlo = jax.jit(summed).lower(x, w).compile().as_text()
    found = list(moves(hlo))
    assert found and all(move.looped and move.times == 5 for move in found if move.kind == "all-reduce")
    assert sum(collectives(hlo).values()) == sum(move.bytes * move.times for move in found)
    gathered = jax.jit(lambda w: w + 1, out_shardings=split()).lower(w).compile().as_text()
    assert list(moves(gathered)) == [Move("all-gather", 8 * 8 * 4, 1, False)]


def test_loops_whose_condition_alone_says_how_often_they_run():
    """As libtpu writes them, inside a loop that goes on until something happens."""
    hlo = """HloModule counted

%until (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %seen = pred[] get-tuple-element(%p), index=0
  ROOT %not.1 = pred[] not(%seen)
}

%below (q: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28), metadata={op_name="x"}
  %q = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%q), index=0
  ROOT %compare.2 = pred[] compare(%count, %limit), direction=LT
}

%layer (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = (f32[2]{0}, f32[8]{0}) all-gather-start(%part), dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %gathered.1)
}

%token (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %w.1 = (s32[], f32[8]{0}) while(%s), condition=%below, body=%layer, backend_config={"flag_configs":[]}
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  ROOT %w.2 = (s32[], f32[8]{0}) while(%a), condition=%until, body=%token
}
"""
    assert list(moves(hlo, (5,))) == [Move("all-gather", 32, 5 * 28, True)]


@pytest.fixture(scope="module")
def calls():
    m, recipe = tiny.materials(), tiny.tiny_recipe()
    found = walk(recipe, tiny.setup(MESH), m.automaton, m.tokenizer, Judge(m.embedder, m.bank), len(m.taxonomy.nodes))
    return {call.name: call for call in found}


def test_the_walk_is_the_step(calls):
    names = ["gather", "encode", "prefill", "decode", "choose", "arrange", "score", "judge", "experience", "update", "average"]
    assert list(calls) == names
    config = tiny.tiny_recipe().grpo
    assert calls["update"].times == config.prompts // config.mini_prompts and calls["score"].times == 1 + config.scores_policy


def test_what_a_step_holds(calls):
    """Beside `gather` there is the batch, beside `encode` there are the parameters instead, and beside `decode` the visual tokens."""
    setup, recipe = tiny.setup(MESH), tiny.tiny_recipe()
    prompts, gold = (sum(x.nbytes for x in jax.tree.leaves(tree)) / 4 for tree in tiny.batch(recipe.grpo.prompts))
    assert calls["gather"].beside - calls["encode"].beside == prompts - chip_bytes(setup.abstract_state(optax.identity()).params)
    assert calls["decode"].beside - calls["prefill"].beside == chip_bytes(calls["encode"].traced.out_info) - gold


def test_no_parameter_is_gathered_in_the_decode_loop(calls):
    """The rollout's table: weights are gathered once, by `gather`; inside decoding nothing moves that is as large as a matrix's shard."""
    compiled = {name: list(moves(calls[name].traced.lower().compile().as_text())) for name in ("gather", "decode")}
    leaves = flatten_dict(tiny.setup(MESH).abstract_reference()["model"]).items()
    matrices = [x.sharding.shard_shape(x.shape) for path, x in leaves if path[-1] == "kernel"]
    smallest = min(4 * math.prod(shape[1:]) for shape in matrices)  # one layer's
    assert sum(move.bytes for move in compiled["gather"] if move.kind == "all-gather") > smallest
    looped = [move for move in compiled["decode"] if move.looped and move.kind == "all-gather"]
    assert all(move.bytes < smallest for move in looped), looped


def test_largest():
    tried = []
    assert largest(64, 16, lambda n: tried.append(n) or n <= 32) == 32 and tried == [64, 32]
    assert largest(64, 16, lambda n: False) is None
    assert largest(8, 16, lambda n: True) is None


def test_topologies():
    assert parse_topology("v5e:8x8").count == 64 and parse_topology("2*v5p:2x2x2").count == 16 and not parse_topology("h100:2x8").is_tpu
    for name in ("v5e", "v9:2x2", "v5e:0x2", "v5e:2x2,", "0*v5e:2x2"):
        with pytest.raises(ValueError, match="must be like v5e:8x8"):
            parse_topology(name)
    assert all(any(chip.kind.startswith(kind) and chip.flops == rate for kind, rate in PEAKS.items()) for chip in CHIPS.values())


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (the extra tpu)")


def planned(*argv: str) -> dict:
    """By a process of its own: libtpu reads its environment when it is loaded."""
    command = [sys.executable, "-m", "pgjax.cli", "plan", *argv, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


PODS = """
from pgjax.plan.chips import describe, parse_topology, prepare
v5e, v5p = parse_topology("v5e:8x8"), parse_topology("v5p:2x2x2")
prepare(v5e)
from pgjax.config import MeshConfig
from pgjax.parallel.mesh import make_mesh, shares_of
for shares in (shares_of(make_mesh(MeshConfig(1, 16, 4), describe(v5e))), shares_of(make_mesh(MeshConfig(1, 8, 1), describe(v5p)))):
    print(len(shares), sorted({share.own for share in shares.values()}))
"""


@needs_libtpu
def test_processes_of_a_pod_have_rows_together_and_apart():
    """A host of a v5e pod has two shards of a batch, which another host has too; of a v5p cube every other one."""
    done = subprocess.run([sys.executable, "-c", PODS], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    pod, cube = done.stdout.splitlines()[-2:]
    assert pod == f"16 {[(n, n + 1) for n in range(0, 16, 2)]}" and cube == "2 [(0, 2, 4, 6), (1, 3, 5, 7)]"


HELD = """
import dataclasses
from pgjax.plan.chips import describe, parse_topology, prepare
prepare(parse_topology("v5e:2x2"))
from pgjax.config import MeshConfig
from pgjax.plan.plan import Planner
from pgjax.recipes import load_recipe
for name, mesh in (("v5e:2x2", (1, 4, 1)), ("v5e:8x8", (1, 16, 4))):
    topology = parse_topology(name)
    recipe = dataclasses.replace(load_recipe("proguard_7b"), mesh=MeshConfig(*mesh), devices=topology.count)
    print(sum(Planner(recipe, topology, describe(topology)).held().values()), topology.chip.memory)
"""


@needs_libtpu
def test_what_a_chip_holds_of_a_7b():
    """In float32 parameters, two moments and a reference: more than four v5e have, whatever is compiled, and a ninth of what 64 have."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    (small, limit), (large, _) = (map(float, line.split()) for line in done.stdout.splitlines()[-2:])
    assert small > 1.7 * limit and large < limit / 9 and 15 < small / large < 17


@needs_libtpu
def test_a_plan_for_a_tpu(tmp_path):
    recipe = dataclasses.replace(tiny.tiny_recipe(), devices=0, mesh=MeshConfig(1, -1, 1))
    found = planned(str(write_config(tmp_path, recipe)), "--topology", "v5e:2x2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert found["fits"] and found["waves"] == 1 and found["settings"] == {} and found["chips"] == 4
    programs = {program["name"]: program for program in found["programs"]}
    assert {"encode", "prefill", "decode", "score", "update"} <= programs.keys()
    for program in found["programs"]:
        assert program["fits"] and program["why"] is None and program["beside_bytes"] < program["peak_bytes"] < program["limit_bytes"]
    # Twice the updates, with the score's passes and two more for the gradients, of rows alike.
    assert 2 < programs["update"]["flops"] / (programs["score"]["flops"] / programs["score"]["times"]) < 4.5
    assert programs["gather"]["collectives"]["all-gather"] > 0 and 0 < found["floor_seconds"] < 1
    text = table(found)
    assert "It fits." in text and text.count("| yes |") == len(found["programs"])


@needs_libtpu
@pytest.mark.drill
def test_what_does_not_fit_says_why(tmp_path):
    """Layers are scanned: so many that their weights alone are too much compile as fast as two."""
    recipe = dataclasses.replace(tiny.tiny_recipe(), devices=0, mesh=MeshConfig(1, -1, 1))
    deep = ("--model.text.layers", "500000", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    found = planned(str(write_config(tmp_path, recipe)), "--topology", "v5e:2x2", *deep)
    limit, text = found["programs"][0]["limit_bytes"], table(found)
    assert not found["fits"] and found["largest"] == {"rollout.rows": None, "grpo.micro_prompts": None} and found["waves"] is None
    assert sum(found["held_bytes"].values()) > limit and "These alone are too much" in text
    why = {program["name"]: program["why"] for program in found["programs"] if not program["fits"]}
    assert "update" in why and "15.75" in why["update"] and why["update"] in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("toy", "--topology", "v9:2x2"), "must be like v5e:8x8"),
        (("toy", "--topology", "v5e:2x2"), "does not fit 4 devices"),
        (("toy",), "--topology"),
        (("nowhere", "--topology", "v5e:2x2"), "not in configs/"),
        (("rewriter_7b", "--topology", "v5e:2x2"), "plans steps of GRPO"),
    ],
)
def test_bad_plans_are_one_line(argv, says, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
