"""One GRPO step of the tiny recipe, four devices in all, by one of N processes: python step_of_processes.py OUT N [HOST:PORT K].

Process 0 writes what the step sampled, scored and learnt to OUT (npz). The optimiser is plain descent with rate 1, so that what an update
takes off the parameters is its gradient.
"""

import sys
from pathlib import Path

from pgjax.commands.start import start_jax
from pgjax.parallel.start import find_group, joined

DEVICES = 4


def step(out: Path) -> None:
    import jax
    import numpy as np
    import optax
    from jax.experimental.multihost_utils import process_allgather
    from tiny_recipe import tiny_recipe

    from pgjax.config import MeshConfig
    from pgjax.grpo.programs import Judge, Programs
    from pgjax.grpo.trainer import grpo_step, load
    from pgjax.parallel.mesh import AXES, gather_rows, make_mesh, place_rows, share_of
    from pgjax.train.materials import make_materials
    from pgjax.train.setup import make_setup

    recipe = tiny_recipe()
    across = np.array(jax.devices()).reshape(jax.process_count(), -1).T  # a process's devices do not lie side by side
    mesh = make_mesh(MeshConfig(1, DEVICES, 1), list(across.flat))
    materials = make_materials(recipe, out.parent / "materials", share_of(mesh))
    setup, optimizer = make_setup(recipe.model, mesh), optax.sgd(1.0)
    automaton = materials.automaton  # one token in twelve ends an answer: an untrained model then gives answers of many lengths
    automaton = automaton.replace(stop_V=automaton.stop_V | (np.arange(len(automaton.stop_V)) % 12 == 0))
    programs = Programs(recipe, setup, optimizer, automaton, materials.tokenizer, Judge(materials.embedder, materials.bank))
    params = setup.init(0)
    reference, state, found = setup.reference(params), setup.state(params, optimizer), {}
    whole = lambda tree: jax.tree.map(lambda x: np.array(process_allgather(x, tiled=True)), tree)  # noqa: E731
    decode, score, judge, choose, update = programs.decode, programs.score, programs.judge, programs.choose, programs.update

    def decoded(*args, **kwargs):
        given = decode(*args, **kwargs)
        found.update(tokens=whole(given[0].tokens_PGR), sampled=whole(given[0].logp_PGR), length=whole(given[0].length_PG))
        return given

    def scored(*args):
        given = score(*args)
        found["ref" if "old" in found else "old"] = whole(given)
        return given

    def judged(*args):
        """With a reward that differs between the answers."""
        given = judge(*args)
        length_PG = args[0].length_PG
        return given.replace(reward_PG=jax.jit(lambda x: (x % 5).astype(np.float32), out_shardings=given.reward_PG.sharding)(length_PG))

    def chosen(*args):
        given = choose(*args)
        found["width"] = given[1]
        return given

    def updated(state, *args):
        number, before = int(whole(state.updates)), whole(state.params)
        after, metrics = update(state, *args)
        found[f"gradient{number}"] = np.concatenate(
            [x.ravel() for x in jax.tree.leaves(jax.tree.map(np.subtract, before, whole(after.params)))]
        )
        found.update({f"{name}{number}": whole(value) for name, value in metrics.items()})
        return after, metrics

    programs.decode, programs.score, programs.judge, programs.choose, programs.update = decoded, scored, judged, chosen, updated
    grpo_step(programs, materials.bank, recipe, state, reference, 0, load(materials, recipe, mesh, 0), lambda phase, outputs: None)
    alike, rows = jax.sharding.Mesh(across[None], AXES), np.arange(2 * DEVICES)  # tensor parts processes: they have the same rows
    found["placed"] = whole(place_rows(share_of(alike).of(rows), alike))
    found["gathered"] = gather_rows(share_of(alike).of(rows), alike)
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    out, processes, *where = sys.argv[1:]
    address, number = where or (None, None)
    group = find_group(address, int(processes), int(number), True) if where else None
    start_jax(DEVICES // int(processes))
    with joined(group):
        step(Path(out))
