"""Launch files: the JobSet by the published schemas, the scripts by their shells."""

import copy
import subprocess
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
