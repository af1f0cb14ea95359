"""How a process finds out whether it is one of several. What several do together: test_processes_drill.py."""

import errno
import os
import signal
import subprocess
from pathlib import Path
from unittest import mock

import jax
import pytest
import yaml

from pgjax import cli
from pgjax.cli import main
from pgjax.parallel import start
from pgjax.parallel.start import Group, find_group

LAUNCH = Path(__file__).parents[1] / "launch"
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"}
GKE |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}  # else jax asks the metadata server
SECOND_SLICE = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a"}


def detected(monkeypatch, environment: dict[str, str], simulated: bool = False) -> Group | None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return find_group(None, None, None, simulated)


@pytest.fixture
def on_tpu(monkeypatch):
    """A machine with TPUs, as far as jax's detection looks."""
    for module in ("jax._src.clusters.cloud_tpu_cluster", "jax._src.clusters.cluster"):
        monkeypatch.setattr(f"{module}.running_in_cloud_tpu_vm", True)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, Group(4, 3)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # the login shell of an allocation for four tasks
        (STEP, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, None),  # not all that jax reads
        (OPEN_MPI, Group(2, 1)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        (GKE, None),  # no TPU here
    ],
)
def test_what_the_environment_says(environment, group, monkeypatch):
    assert detected(monkeypatch, environment) == group


@pytest.mark.parametrize(
    ("environment", "simulated", "group"),
    [
        (GKE, False, Group(4, 2)),
        (GKE | SECOND_SLICE, False, Group(8, 6)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False, None),  # a slice of one host
        (GKE, True, None),  # a toy on one host of a slice waits for nobody
    ],
)
def test_tpu_slices(environment, simulated, group, monkeypatch, on_tpu):
    assert detected(monkeypatch, environment, simulated) == group


def test_flags_come_before_the_environment(monkeypatch):
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    assert find_group("host:12", 2, 1, False) == Group(2, 1, "host:12")
    assert find_group("host:12", 1, 0, False) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--processes", "2"], "--coordinator and --process is missing"),
        (["--coordinator", "host:1", "--processes", "2", "--process", "2"], "one of 0 to 1"),
        (["--coordinator", "host", "--processes", "2", "--process", "1"], "HOST:PORT"),
        (["--coordinator", "host:1", "--processes", "3", "--process", "1"], "8 simulated devices do not divide over 3 processes"),
    ],
)
@pytest.mark.parametrize("command", [["train", "toy"], ["sft", "toy_rewriter", "--devices", "8", "--mesh.data", "8"]])
def test_wrong_flags_are_one_line(command, flags, says, capsys):
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_process_alone_hears_of_sigterm_and_then_no_more(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with start.preemption() as preempted:
        assert not preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted(2)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit) as stopped:
        start.stop(2, show=True)
    assert stopped.value.code == 143 and "saved after step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ValueError("no such\nthing"), 2, "no such thing"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "runs/x cannot be written: No space left on device; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "a file cannot be written: Disk quota exceeded; make room"),
    ],
)
def test_known_faults_are_one_line_alone_and_of_several(error, status, says, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "report", mock.Mock(side_effect=error))
    assert cli.main(["report", "runs/x"]) == status
    alone = capsys.readouterr().err
    assert says in alone and alone.count("\n") == 1
    monkeypatch.setattr(start.os, "_exit", mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        start.fail(error)
    start.os._exit.assert_called_with(status)
    assert capsys.readouterr().err == alone


def test_other_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "report", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError):
        cli.main(["report", "runs/x"])


def test_launch_files():
    """They parse, begin with their explanation, and call what there is."""
    files = {path.name: path.read_text() for path in LAUNCH.iterdir()}
    assert set(files) == {"local.sh", "slurm.sbatch", "gke_jobset.yaml", "tpu_vm.sh"}
    for name, text in files.items():
        lines = text.splitlines()[0 if name.endswith(".yaml") else 1 :]
        assert all(line.startswith("# ") for line in lines[:5]), name
        if not name.endswith(".yaml"):
            subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    [job] = yaml.safe_load(files["gke_jobset.yaml"])["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"][:2] == ["pgjax", "train"]
