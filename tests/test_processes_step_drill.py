"""A GRPO step by 2 and by 4 real processes beside the same by one: what is sampled, scored and learnt. `make drills` runs it."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drill_runs import environment
from tiny_recipe import G, P, tiny_recipe

from pgjax.generate.score import packed_width

pytestmark = pytest.mark.drill
SCRIPT = Path(__file__).with_name("step_of_processes.py")


def step_by(processes: int, folder: Path) -> dict[str, np.ndarray]:
    out = folder / f"{processes}.npz"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    where = [[address, str(k)] for k in range(processes)] if processes > 1 else [[]]
    command = [sys.executable, str(SCRIPT), str(out), str(processes)]
    started = [subprocess.Popen([*command, *at], env=environment(), stderr=subprocess.PIPE, text=True) for at in where]
    said = [process.communicate(timeout=600)[1] for process in started]
    assert not any(process.returncode for process in started), said
    return dict(np.load(out))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, np.ndarray]:
    return step_by(1, tmp_path_factory.mktemp("one"))


def test_the_step_is_skewed(one):
    """Left to itself, each process of two, and some of four, would have packed rows of another width than it does with the others. Of
    two, which have every other shard, each has every other quarter."""
    recipe, longest = tiny_recipe(), one["length"].sum(axis=1)
    per_row = recipe.grpo.micro_prompts // 4
    width = lambda tokens_P: packed_width(int(tokens_P.max()), per_row * G * recipe.answer.max_tokens, recipe.rollout.packed_step)  # noqa: E731
    halves = np.split(longest, 4)
    assert len({width(np.concatenate(halves[k::2])) for k in (0, 1)}) == 2 and len({width(share) for share in np.split(longest, 4)}) > 2
    assert one["width"] == width(longest)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_by_several_processes_is_that_of_one(one, processes, tmp_path):
    several = step_by(processes, tmp_path)
    assert several.keys() == one.keys() and {"gradient0", "gradient1", "actor/pg_loss1"} <= one.keys()
    for name in ("tokens", "length", "width", "placed", "gathered"):
        np.testing.assert_array_equal(several[name], one[name], err_msg=name)
    for name in one.keys() - {"tokens", "length", "width", "placed", "gathered"}:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert one["gradient0"].any() and one["gradient1"].any() and one["tokens"].shape[:2] == (P, G)
