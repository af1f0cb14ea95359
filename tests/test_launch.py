"""Launch files: the JobSet by the published schemas, the scripts by their shells."""

import copy
import itertools
import math
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from pgjax.recipes import load_recipe, override, validate

LAUNCH = Path(__file__).parent.parent / "launch"
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def check(jobset: dict) -> None:
    """Its jobs by Kubernetes' schema, and what is around them by that of JobSet v1alpha2, whose model drops what it does not know."""
    around = copy.deepcopy(jobset)
    for replicated in around["spec"]["replicatedJobs"]:
        spec = replicated["template"].pop("spec")
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, "spec": spec}
        kubernetes_validate.validate(job, "1.34", strict=True)
    JobsetV1alpha2JobSet.model_validate(around)
    model = JobsetV1alpha2JobSet.from_dict(around)
    assert model is not None and model.to_dict() == around


def job_and_command(jobset: dict) -> tuple[dict, list[str]]:
    [slice_] = jobset["spec"]["replicatedJobs"]
    spec = slice_["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    return spec, container["command"]


def flags(command: list[str]) -> dict[str, str]:
    return {name: value for name, value in itertools.pairwise(command) if name.startswith("--")}


def test_the_jobset():
    check(JOBSET)
    spec, command = job_and_command(JOBSET)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"], "a pod for every host, with its number"
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    topology = selector["cloud.google.com/gke-tpu-topology"]
    rows = re.findall(
        r"^\| `(\S+) --topology v5e:(\S+) ([^`]+)` \| yes \| (\d+) \|", (LAUNCH.parent / "docs" / "scale.md").read_text(), re.M
    )
    [(mesh, micro)] = [(mesh, micro) for recipe, shape, mesh, micro in rows if (recipe, shape) == (command[2], topology)]
    given = flags(command)
    assert flags(mesh.split()) | {"--mesh.data": "1", "--grpo.micro_prompts": micro} == {
        name: value for name, value in given.items() if name.startswith(("--mesh", "--grpo"))
    }
    chips = spec["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert (
        spec["parallelism"] * chips == math.prod(map(int, topology.split("x"))) == int(given["--mesh.fsdp"]) * int(given["--mesh.tensor"])
    )


@pytest.mark.parametrize("slices", [1, 2])
def test_slices(slices):
    """As the file's comment says for more of them: it is a JobSet, and a recipe whose numbers divide."""
    jobset = copy.deepcopy(JOBSET)
    jobset["spec"]["replicatedJobs"][0]["replicas"] *= slices
    _, command = job_and_command(jobset)
    for name in ("--mesh.data", "--grpo.micro_prompts"):
        at = command.index(name) + 1
        command[at] = str(int(command[at]) * slices)
    check(jobset)
    given = [word for name, value in flags(command).items() if name.startswith(("--mesh", "--grpo")) for word in (name, value)]
    validate(override(load_recipe(command[2]), ["--devices", str(64 * slices), *given]))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec",), {"failurePolicies": {}}),
        (("spec", "failurePolicy"), {"maxRestarts": "often"}),
        (("spec", "replicatedJobs", 0), {"replica": 2}),
        (("spec", "replicatedJobs", 0, "template", "spec"), {"completions": "4"}),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), {"restartPolicies": "Never"}),
    ],
)
def test_what_the_schemas_find(path, wrong):
    jobset = copy.deepcopy(JOBSET)
    at = jobset
    for key in path:
        at = at[key]
    at.update(wrong)
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        check(jobset)


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.fixture
def at_the_other_end(tmp_path, monkeypatch):
    """Runs a launch file with stand-ins for what it calls, and says what pgjax was given there: PGJAX_CACHE, then its arguments."""
    for name, does in {
        "srun": 'echo "$1"; while [ "$1" != pgjax ]; do shift; done; exec "$@"',
        "gcloud": 'while [ "$1" != --command ]; do shift; done; unset PGJAX_CACHE; exec sh -c "$2"',
        "pgjax": 'printf "%s\\n" "$PGJAX_CACHE" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("PGJAX_CACHE", raising=False)

    def run(script: str, *arguments: str, **environment: str) -> list[str]:
        command = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


def test_all_tasks_share_a_cache(at_the_other_end, tmp_path):
    slurm = partial(at_the_other_end, "slurm.sbatch", "train", "toy", SLURM_CPUS_PER_TASK="3")
    assert slurm() == ["--cpus-per-task=3", str(tmp_path / "cache"), "train", "toy"]
    assert slurm(PGJAX_CACHE="/shared")[1] == "/shared"
    tpu_vm = partial(at_the_other_end, "tpu_vm.sh", "NAME", "ZONE", "train", "it's $HOME")
    assert tpu_vm() == ["", "train", "it's $HOME"]
    assert tpu_vm(PGJAX_CACHE="/the bucket") == ["/the bucket", "train", "it's $HOME"]


@pytest.mark.parametrize("processes", ["two", "0", "-1", "", "2x"])
def test_local_counts_processes(processes):
    done = subprocess.run(["sh", LAUNCH / "local.sh", processes, "train", "toy"], capture_output=True, text=True)
    assert done.returncode == 2 and "must be a number from 1" in done.stderr and done.stderr.count("\n") == 1
