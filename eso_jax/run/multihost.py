"""Several processes as one run: who they are, and how they wait for each other and agree.

`start` joins this process to the others (`eso-jax train --multi-host`). Without it, a process is a run of its own, and
the functions here do nothing. Process 0 is the writer: only it prints messages, and it writes the files of the work
directory, except each process's own (its share of a checkpoint, a trace).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jax

from eso_jax.console import ending, is_writer, tell
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.files import writing

WAIT = 600  # seconds that a process waits for the others before it gives up
PATIENCE = 15  # seconds between two messages about it


def start(roll: Path, wait: int = WAIT) -> None:
    """Joins the run, before anything else touches a device.

    JAX finds the other processes (Slurm, Cloud TPU, Kubernetes, Open MPI), or JAX_COORDINATOR_ADDRESS (HOST:PORT of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

    Args:
      roll: a directory that all hosts share, where each process writes its name until all have started.
      wait: seconds after which this process reports which processes are missing, and ends.

    Raises:
      EsoError: the other processes are not known, or could not be joined.
    """
    index, count = (os.environ.get(name) for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    for name, value in (("JAX_PROCESS_ID", index), ("JAX_NUM_PROCESSES", count)):
        require(value is None or value.isdigit(), name, value, "must be a number")
    with writing("--workdir", roll.parent):
        roll.mkdir(parents=True, exist_ok=True)
        own_name = roll / f"{_number()} on {socket.gethostname()}"
        own_name.touch()
    try:
        _join(roll, wait, num_processes=int(count) if count else None, process_id=int(index) if index else None,
              initialization_timeout=wait + 30)
        _hosts[:] = gather("start", socket.gethostname(), wait)
        own_name.unlink(missing_ok=True)
        barrier("roll", wait)
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        own_name.unlink(missing_ok=True)
        if isinstance(error, RunAgain):  # at a normal end Python would wait for the others
            leave(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EsoError(f"--multi-host: this process could not join the others ({reason}); start it by srun or on a TPU "
                       "pod, or set JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and "
                       "JAX_PROCESS_ID") from error
    except KeyboardInterrupt as error:
        own_name.unlink(missing_ok=True)
        leave(error)
    if is_writer():
        shutil.rmtree(roll, ignore_errors=True)


def check_alone() -> None:
    """Raises an EsoError if this process was started as one of several but has not joined them: each would write as if
    it were alone, probably into the same work directory."""
    if jax.distributed.is_initialized():
        return
    counts = {name: os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS",
                                                          "OMPI_COMM_WORLD_SIZE")}
    for name, count in counts.items():
        require(not count.isdigit() or int(count) <= 1, name, count,
                "this process is one of several; give --multi-host to eso-jax train, or for a run of its own unset "
                f"that (env -u {name} eso-jax train ...)")
    require(jax.process_count() == 1, "processes", jax.process_count(),
            "this is one of several of a TPU pod; give --multi-host to eso-jax train")


def _join(roll: Path, wait: int, **arguments: Any) -> None:
    """jax.distributed.initialize in a thread, so that this thread can report which processes are missing, and receives
    Ctrl-C."""
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**arguments)
        except Exception as error:
            failures.append(error)

    thread, began = threading.Thread(target=join, daemon=True), time.time()
    thread.start()
    while thread.is_alive():
        thread.join(min(PATIENCE, max(began + wait - time.time(), 0.1)))
        if not thread.is_alive():
            break
        came, missing = _roll_call(roll, began)
        if time.time() >= began + wait:  # JAX itself would end the process without naming the missing ones
            leave(RunAgain(f"waited {wait} s for the other processes to start; {missing}"))
        if _number() in ("?", next(iter(came), "?")):
            tell(f"eso-jax: waiting for the other processes; {missing}")
    if failures:
        raise failures[0]


def _number() -> str:
    """This process's number in the run before JAX has started, as a text; "?" if only JAX can find it."""
    names = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")
    return next((os.environ[name] for name in names if name in os.environ), "?")


def _roll_call(roll: Path, began: float) -> tuple[list[str], str]:
    """(numbers of the processes that have started, a message about these and the missing ones), from the names in
    `roll`. Names that an earlier start has left do not count."""
    came: list[str] = []
    with suppress(OSError):  # only messages depend on it
        for path in sorted(roll.iterdir()):
            with suppress(FileNotFoundError):
                came += [path.name] if path.stat().st_mtime > began - 60 else []
    counts = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    count = next((int(os.environ[name]) for name in counts if os.environ.get(name, "").isdigit()), 0)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    numbers = sorted({name.partition(" ")[0] for name in came}, key=lambda number: (len(number), number))
    missing = [f"process {n}" + (f" on {hosts[n]}" if n < len(hosts) and hosts[n] else "") for n in range(count)
               if str(n) not in numbers] if "?" not in numbers else []
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    return numbers, (f"missing: {', '.join(missing) or 'some'}{f' (of the nodes {nodes})' if nodes else ''}; "
                     f"came: {', '.join(came)}")


def _client() -> Any:
    """JAX's connection to the run's key-value store, or None. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def barrier(name: str, wait: int = WAIT) -> None:
    """Waits until all processes have called it; raises as `gather` does."""
    gather(name, "", wait)


_hosts: list[str] = []  # of each process; known once all have started
_turns: Counter[str] = Counter()  # how often each name was used: JAX needs a new key each time


def host(index: int) -> str:
    """A process's number and host, for messages."""
    return f"process {index}" + (f" on {_hosts[index]}" if index < len(_hosts) else "")


def gather(name: str, text: str, wait: int = WAIT) -> list[str]:
    """Every process's text, by its number. All processes must call it, with the same name.

    Raises:
      RunAgain: a process did not call it in time; the error names its host.
    """
    client, count = _client(), jax.process_count()
    if client is None or count == 1:
        return [text]
    _turns[name] += 1
    place = f"eso_jax/{name}/{_turns[name]}"
    client.key_value_set(f"{place}/{jax.process_index()}", text)
    return [_text_of(index, place, name, wait) for index in range(count)]


def _text_of(index: int, place: str, name: str, wait: int) -> str:
    """The text that process `index` has put at `place`. Asks in short intervals, so that Ctrl-C works."""
    began = told = time.monotonic()
    while True:
        try:
            return _client().blocking_key_value_get(f"{place}/{index}", 1000 * min(wait, 5))
        except jax.errors.JaxRuntimeError as error:
            now = time.monotonic()
            if "DEADLINE_EXCEEDED" not in str(error):  # the store itself is gone
                raise RunAgain(f"lost {host(0)}, by which the processes speak, at {name!r} "
                               f"({str(error).splitlines()[0][:200]})") from error
            if now - began >= wait:
                raise RunAgain(f"waited {now - began:.0f} s at {name!r} for {host(index)}; see what its log "
                               "says") from error
        if now - told >= PATIENCE and is_writer():
            tell(f"eso-jax: waiting at {name!r} for {host(index)}")
            told = now


def who_is_silent(wait: int = 5) -> str:
    """ "no sign of HOSTS; " for processes that do not answer, else "": a part of an error message. All processes with
    the same error should call it, since the call is the sign that the others wait for.

    Process 0 has the key-value store: if the store does not answer, it is process 0 that is missing.
    """
    client, place, until = _client(), "eso_jax/still here", time.monotonic() + wait
    silent = [host(index) for index in range(1, jax.process_count())]
    try:
        while silent and time.monotonic() < until:
            client.key_value_set(f"{place}/{jax.process_index()}", "yes", allow_overwrite=True)
            signs = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(place)}
            silent = [host(index) for index in range(jax.process_count()) if index not in signs]
            time.sleep(0.2)
    except jax.errors.JaxRuntimeError:
        silent = [host(0)]
    return f"no sign of {', '.join(silent)}; " if silent else ""


def agree(name: str, problem: str | None) -> str | None:
    """The problem of the first process that has one, or None: all continue or stop together. All processes must call
    it."""
    for index, text in enumerate(gather(name, problem or "")):
        if text:
            return text if jax.process_count() == 1 else f"{host(index)}: {text}"
    return None


def check_same(values: dict[str, Any]) -> None:
    """Raises, in all processes, an EsoError about the first value that differs from that of process 0. All processes
    must call it."""
    of_all = [json.loads(text) for text in gather("config", json.dumps(values))]
    for index, own in enumerate(of_all):
        for name, value in own.items():
            require(value == of_all[0].get(name), name, value, f"in {host(index)}, but {of_all[0].get(name)!r} in "
                    f"{host(0)}; all processes of a run need the same")


def by_writer(name: str, action: Callable[[], None]) -> None:
    """Runs an action in the writer while the others wait; its EsoError or RunAgain is raised in all processes."""
    problem = ""
    if is_writer():
        try:
            action()
        except (EsoError, RunAgain) as error:
            problem = f"{'mistake' if isinstance(error, EsoError) else 'again'}:{error}"
    kind, _, problem = gather(name, problem)[0].partition(":")
    if kind:
        raise EsoError(problem) if kind == "mistake" else RunAgain(problem)


def leave(error: BaseException) -> NoReturn:
    """Ends the process with the exit code of the command line; waits only shortly for the other processes to end."""
    code, words = ending(error)
    if code == 1:
        tell("".join(traceback.format_exception(error)))
    tell(f"eso-jax: {socket.gethostname()}: {words}")
    if jax.distributed.is_initialized() and code != 130:  # if all end together, none should report another as lost
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(10)
    os._exit(code)
