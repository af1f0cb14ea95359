"""Launch files: the JobSet by the published schemas, the scripts by their shells."""

import copy
import os
import subprocess
from functools import partial
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

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


def test_the_jobset():
    check(JOBSET)
    [slice_] = JOBSET["spec"]["replicatedJobs"]
    spec = slice_["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"], "a pod for every host, with its number"


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
    monkeypatch.delenv("PGJAX_CACHE")

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
