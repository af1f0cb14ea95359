"""How a process joins the others of its run, learns that one of them is gone, and stops when it is asked to.

jax has no public call for "is there a cluster", for a barrier without devices, or for who is alive; those parts of it are imported here
and nowhere else. Nothing here imports jax before it is called: its settings come first.
"""

import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TextIO

from pgjax.files import NO_ROOM

HEARTBEAT_SECONDS = 20  # a process that gives no sign of life for so long is gone
JOIN_SECONDS = 300  # within which all processes must have been started; nodes of a cluster come up minutes apart
SHUTDOWN_SECONDS = 60  # a process that is done waits so long for the others
WORK_SECONDS = 24 * 3600  # processes wait so long for one that builds data or writes the last report
STOPPED = 143  # exit status after SIGTERM: not 0, or a scheduler would take the run for ended and not start it again

_barriers = itertools.count()  # all processes count alike


@dataclass(frozen=True)
class Group:
    """The processes of a run, and which of them this one is. `coordinator`: HOST:PORT where process 0 listens; None: jax knows."""

    processes: int
    process: int
    coordinator: str | None = None


class Preempted(SystemExit):
    """A run that was asked to stop has saved; not an error, and nothing to report."""


def find_group(coordinator: str | None, processes: int | None, process: int | None, simulated: bool) -> Group | None:
    """From the three flags, or from the environment of SLURM, Open MPI, Cloud TPU, GKE or Kubernetes; None for a process alone.

    `simulated`: it will have simulated devices. ValueError for flags that do not make sense.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in flags.items() if value is None]:
        if len(missing) < len(flags):
            raise ValueError(f"{', '.join(flags)} go together: {' and '.join(missing)} is missing")
        return detect(simulated)
    assert coordinator is not None and processes is not None and process is not None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator {coordinator!r} must be HOST:PORT, where process 0 listens")
    if not 0 <= process < processes:
        raise ValueError(f"--process {process} must be one of 0 to {processes - 1}, as there are --processes {processes}")
    return Group(processes, process, coordinator) if processes > 1 else None


def detect(simulated: bool) -> Group | None:
    """The cluster that jax.distributed.initialize() would find, where this process was really started as one of several."""
    import jax
    from jax._src.clusters import ClusterEnv

    def started_with_others(name: str) -> bool:
        if name == "SlurmCluster":  # a shell inside an allocation has the variables of its tasks too, but is a step of one
            return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        if name == "K8sCluster":  # any pod has the variables that jax looks for
            return "JOB_COMPLETION_INDEX" in os.environ
        if name.endswith("TpuCluster"):  # one host of a slice may be used for its CPU alone
            return not simulated and "tpu" in (jax.config.values["jax_platforms"] or "")
        return True

    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and started_with_others(kind.__name__)]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    if found is None or (processes := found.get_process_count()) == 1:
        return None
    return Group(processes, found.get_process_id())


@contextmanager
def joined(group: Group | None) -> Iterator[bool]:
    """Together with the others of the group, if there is one; yields whether this is the process that prints and writes logs.

    From here on a process that dies takes the others down: each says in one line who is gone, and ends with status 1. One that fails
    says why and ends at once. Call it before the first use of a device.
    """
    if group is None:
        yield True
        return
    last_words = LastWords(group)
    join(group)
    last_words.when_aborted = last_words.lost_coordinator
    watch = threading.Thread(target=keep_watch, args=(group, last_words), daemon=True)
    watch.start()
    try:
        yield group.process == 0
    except Preempted:
        leave(last_words, STOPPED)
        raise
    except Exception as error:
        fail(error)
    leave(last_words, 0)


def join(group: Group) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs at the same time would mix up their messages in gloo
    jax.config.update("jax_enable_recoverability", True)  # else jax aborts all processes as soon as it misses one, before we can say which
    initialize = partial(
        jax.distributed.initialize,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    try:
        if group.coordinator:
            initialize(group.coordinator, group.processes, group.process, cluster_detection_method="deactivate")
        else:
            initialize()
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise ValueError(f"process {group.process} of {group.processes} cannot join the others ({what}); is the port taken?") from error


class LastWords:
    """One line in place of the C++ runtime's trace when it aborts the process, which it does when it has lost process 0.

    Neither Python's signal handlers nor exceptions see an abort, so the handler is a C function. What the runtime writes on stdout and
    stderr is kept aside, to be shown when the abort is of another kind.
    """

    def __init__(self, group: Group):
        self.group, self.when_aborted = group, self.not_joined
        self._aside = tempfile.TemporaryFile()
        sys.stdout, sys.stderr = (apart(number, self._aside.fileno()) for number in (1, 2))
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self.when_aborted())  # kept, or C calls into nothing
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def not_joined(self) -> NoReturn:
        group = self.group
        where = f" at {group.coordinator}" if group.coordinator else ""
        end(f"the {group.processes} processes did not come together{where} within {JOIN_SECONDS} s; this is number {group.process}", 1)

    def lost_coordinator(self) -> NoReturn:
        from jax._src.distributed import global_state

        host, _, port = str(global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            end(gone([0], self.group), 1)
        self._aside.seek(0)
        print(self._aside.read().decode(errors="replace"), file=sys.stderr)
        end("the C++ runtime aborted this process, see above", 1)


def apart(number: int, aside: int) -> TextIO:
    """Python's own stream to where a file descriptor led; what others write to that number goes to `aside`."""
    stream = open(os.dup(number), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(aside, number)
    return stream


def gone(lost: list[int], group: Group) -> str:
    who = f"process {lost[0]} of {group.processes} is" if len(lost) == 1 else f"processes {lost} of {group.processes} are"
    return f"{who} gone, so process {group.process} ends too; started again, the run goes on from its last checkpoint"


def keep_watch(group: Group, last_words: LastWords) -> None:
    """Ends this process when another is gone. (The loss of process 0, whom everybody asks, is the runtime's to notice.)"""
    from jax._src.distributed import global_state

    everyone = list(range(group.processes))
    while global_state.client is not None:
        try:  # waits for the others, or for their time to be up
            living = global_state.client.get_live_nodes(everyone)
        except RuntimeError:  # process 0 is gone, or this one is leaving
            return
        if last_words.when_aborted == last_words.lost_coordinator and (lost := sorted(set(everyone) - set(living))):
            end(gone(lost, group), 1)
        time.sleep(2)


def leave(last_words: LastWords, status: int) -> None:
    """Waits until all processes are done, as a live one: jax's own wait, at shutdown, gives no sign of life. After that process 0 may be
    gone before this one has heard of it, which is no failure now."""
    import jax

    wait_for_all("leave")
    last_words.when_aborted = lambda: os._exit(status)
    jax.distributed.shutdown()


def fail(error: Exception) -> NoReturn:
    """Ends one process of several, whatever the others do: jax would wait for them at exit."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # is it that another is gone? then the watch ends us
        time.sleep(2 * HEARTBEAT_SECONDS)
    if fault := known(error):
        end(*fault)
    traceback.print_exception(error)
    end("a failure, see above", 1)


def known(error: Exception) -> tuple[str, int] | None:
    """What one line says of a fault that the user can put right, and the exit status; None for any other."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        what = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        return f"{what}; make room, and a run goes on from its last checkpoint", 1
    return None


def end(message: str, status: int) -> NoReturn:
    complain(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complain(message: object) -> None:
    """One line on stderr."""
    print(f"pgjax: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 goes through the body before the others do: what it builds in the run folder, which all share, they find there."""
    import jax

    others = jax.distributed.is_initialized() and jax.process_index() > 0
    if others:
        wait_for_all("first_alone")
    yield
    if jax.distributed.is_initialized() and not others:
        wait_for_all("first_alone")


def wait_for_all(what: str) -> None:
    """Until all processes have come here; it takes as long as the slowest of them works."""
    from jax._src.distributed import global_state

    assert global_state.client is not None
    global_state.client.wait_at_barrier(f"pgjax/{what}/{next(_barriers)}", WORK_SECONDS * 1000)


def agree(what: str, value: str) -> None:
    """ValueError in a process that was started for something else than process 0, before they wait for each other in vain."""
    import jax
    from jax._src.distributed import global_state

    if not jax.distributed.is_initialized():
        return
    assert global_state.client is not None
    name = f"pgjax/agree/{next(_barriers)}"
    if jax.process_index() == 0:
        global_state.client.key_value_set(name, value)
    elif global_state.client.blocking_key_value_get(name, WORK_SECONDS * 1000) != value:
        way = "give all the same command, and folders that all share"
        raise ValueError(f"process {jax.process_index()} has another {what} than process 0; {way}")
    wait_for_all("agree")


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields what each step asks once, with its number: has somebody sent SIGTERM? With several processes they all hear yes at the same
    step, one or two after the signal, whichever of them got it."""
    import jax
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    if jax.distributed.is_initialized():
        yield reached_preemption_sync_point
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(step: int, show: bool) -> NoReturn:
    """When a step has been saved because of SIGTERM."""
    if show:
        print(f"stopped by SIGTERM, saved after step {step}; the same command goes on from there", file=sys.stderr)
    raise Preempted(STOPPED)
