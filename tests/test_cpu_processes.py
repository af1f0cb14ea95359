"""Between CPU processes no program has a collective that XLA may start beside a loop with collectives (parallel/mesh.py)."""

import re
from unittest import mock

import jax
import pytest
import tiny_recipe as tiny

from pgjax.config import MeshConfig
from pgjax.grpo.programs import Judge
from pgjax.parallel import mesh as meshes
from pgjax.plan.count import COLLECTIVES
from pgjax.plan.walk import walk
from pgjax.train.setup import make_setup

MESH = MeshConfig(2, 2, 1)
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (?:\(.*?\)|\S+) ([a-z-]+)\(([^)]*)\)(.*)$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")


def beside_loops(hlo: str) -> list[tuple[str, str]]:
    """Pairs (loop, other): both have collectives, the other comes later in the schedule, and nothing in it waits for the loop."""
    computations: dict[str, list] = {}
    for line in hlo.splitlines():
        if started := COMPUTATION.match(line):
            body = computations.setdefault(started[1], [])
        elif found := INSTRUCTION.match(line):
            name, operation, operands, rest = found.groups()
            called = [name for one, several in CALLED.findall(rest) for name in (one or several.replace("%", "")).split(", ")]
            body.append((name, operation, re.findall(r"%([\w.-]+)", operands), called))

    def moves(operation: str, called: list[str]) -> bool:
        return operation in COLLECTIVES or any(moves(*inner[1::2]) for name in called for inner in computations.get(name, ()))

    pairs = []
    for body in computations.values():
        before: dict[str, set[str]] = {}
        loops: list[str] = []
        for name, operation, operands, called in body:
            before[name] = set(operands).union(*(before.get(operand, ()) for operand in operands))
            if moves(operation, called):
                pairs += [(loop, name) for loop in loops if loop not in before[name]]
                loops += [name] if operation == "while" else []
    return pairs


HLO = """HloModule two

%layer (p: (s32[], f32[8,1])) -> (s32[], f32[8,1]) {
  %p = (s32[], f32[8,1]{1,0}) parameter(0)
  %w = f32[8,1]{1,0} get-tuple-element(%p), index=1
  %whole = f32[8,8]{1,0} all-gather(%w), dimensions={1}
  ROOT %t = (s32[], f32[8,1]{1,0}) tuple(%n, %w)
}

ENTRY %main (w: f32[8,1], v: f32[8,1]) -> f32[8,8] {
  %w.1 = f32[8,1]{1,0} parameter(0)
  %v = f32[8,1]{1,0} parameter(1)
  %first = f32[8,8]{1,0} all-gather(%v), dimensions={1}
  %loop = (s32[], f32[8,1]{1,0}) while(%w.1), condition=%until, body=%layer
  %seen = f32[8,1]{1,0} get-tuple-element(%loop), index=1
  %after = f32[8,8]{1,0} all-gather(%seen), dimensions={1}
  ROOT %beside = f32[8,8]{1,0} all-gather(%v), dimensions={1}
}
"""


def test_a_pair_is_found():
    assert beside_loops(HLO) == [("loop", "beside")]


def test_no_program_of_a_step_has_one():
    m, recipe = tiny.materials(), tiny.tiny_recipe()
    with mock.patch.object(meshes, "between_cpu_processes", lambda: True):
        setup = make_setup(recipe.model, meshes.make_mesh(MESH, jax.devices()[:4]))
    calls = walk(recipe, setup, m.automaton, m.tokenizer, Judge(m.embedder, m.bank), len(m.taxonomy.nodes))
    hlo = {call.name: call.traced.lower().compile().as_text() for call in calls if call.name in ("decode", "score", "update")}
    assert len(hlo) == 3 and any(kind in hlo["update"] for kind in COLLECTIVES)
    assert not {name: pairs for name, text in hlo.items() if (pairs := beside_loops(text))}


def test_a_mesh_that_would_have_them():
    with mock.patch.object(meshes, "between_cpu_processes", lambda: True), pytest.raises(ValueError, match="tensor=2 .* must be 1"):
        meshes.make_mesh(MeshConfig(2, 2, 2))
