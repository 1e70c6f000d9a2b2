"""Several processes as one run: who they are, how they wait for each other, and how they stop.

`start` joins this process to the others (`eso-jax train --multi-host`). A process that was not started so is a run of
its own, and everything here then does nothing. Process 0 is the writer: it alone speaks, and writes to the work
directory what is not each process's own (its share of a checkpoint, a trace).
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax

from eso_jax.console import ending, is_writer, tell
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.files import writing

WAIT = 600  # seconds that a process waits for the others before it gives up
PATIENCE = 15  # seconds between two words about it


def start(roll: Path, wait: int = WAIT) -> None:
    """Joins the run, before anything else touches a device.

    Who takes part is found by JAX (Slurm, Cloud TPU, Kubernetes, Open MPI), or said by JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      roll: a directory that all hosts share, where each process leaves its name until all have come.
      wait: seconds after which this process says who is missing, and ends.

    Raises:
      EsoError: nothing says who takes part.
    """
    index, count = (os.environ.get(name) for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    for name, value in (("JAX_PROCESS_ID", index), ("JAX_NUM_PROCESSES", count)):
        require(value is None or value.isdigit(), name, value, "must be a number")
    with writing("--workdir", roll.parent):
        roll.mkdir(parents=True, exist_ok=True)
        mine = roll / f"{_number()} on {socket.gethostname()}"
        mine.touch()
    try:
        _join(roll, wait, num_processes=int(count) if count else None, process_id=int(index) if index else None,
              initialization_timeout=wait + 30)
        _hosts[:] = gathered("start", socket.gethostname(), wait)
        mine.unlink(missing_ok=True)
        barrier("roll", wait)
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        mine.unlink(missing_ok=True)
        if isinstance(error, RunAgain):  # Python's own end would wait for the others
            leave(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EsoError(f"--multi-host: this process could not join the others ({reason}); start it by srun or on a TPU "
                       "pod, or set JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and "
                       "JAX_PROCESS_ID") from error
    except KeyboardInterrupt as error:
        mine.unlink(missing_ok=True)
        leave(error)
    if is_writer():
        shutil.rmtree(roll, ignore_errors=True)


def check_alone() -> None:
    """Raises an EsoError where a process that has not joined the others was started as one of several: each would
    write as if it were alone, and most likely into the same work directory."""
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
    """jax.distributed.initialize, in a thread: so that this one can say whom it waits for, and hears Ctrl-C."""
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
        if time.time() >= began + wait:  # JAX itself would end the process without a name
            leave(RunAgain(f"waited {wait} s for the other processes to start; {missing}"))
        if _number() in ("?", next(iter(came), "?")):
            tell(f"eso-jax: waiting for the other processes; {missing}")
    if failures:
        raise failures[0]


def _number() -> str:
    """This process's number in the run, before JAX knows it; "?" where only JAX will find it."""
    names = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")
    return next((os.environ[name] for name in names if name in os.environ), "?")


def _roll_call(roll: Path, began: float) -> tuple[list[str], str]:
    """The numbers of the processes that have come, and who has and has not, for people. What an earlier start left
    behind does not count."""
    came: list[str] = []
    with suppress(OSError):  # only words depend on it
        for path in sorted(roll.iterdir()):
            with suppress(FileNotFoundError):
                came += [path.name] if path.stat().st_mtime > began - 60 else []
    counts = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    count = next((int(os.environ[name]) for name in counts if os.environ.get(name, "").isdigit()), 0)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    here = sorted({name.partition(" ")[0] for name in came}, key=lambda number: (len(number), number))
    missing = [f"process {n}" + (f" on {hosts[n]}" if n < len(hosts) and hosts[n] else "") for n in range(count)
               if str(n) not in here] if "?" not in here else []
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    return here, (f"missing: {', '.join(missing) or 'some'}{f' (of the nodes {nodes})' if nodes else ''}; "
                  f"came: {', '.join(came)}")


def _client() -> Any:
    """JAX's connection to the run's key-value store, or None. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def barrier(name: str, wait: int = WAIT) -> None:
    """Waits until all processes have come here; raises as `gathered` does."""
    gathered(name, "here", wait)


_hosts: list[str] = []  # of each process; known once all have started


def host(index: int) -> str:
    """A process by its number and host, for people."""
    return f"process {index}" + (f" on {_hosts[index]}" if index < len(_hosts) else "")


def gathered(name: str, text: str, wait: int = WAIT) -> list[str]:
    """Every process's text, in order; all must ask.

    Raises:
      RunAgain: one did not come in time; it names its host.
    """
    client, count = _client(), jax.process_count()
    if client is None or count == 1:
        return [text]
    place = f"eso_jax/{name}/{_turn(name)}"
    client.key_value_set(f"{place}/{jax.process_index()}", text)
    return [_text_of(index, place, name, wait) for index in range(count)]


def _text_of(index: int, place: str, name: str, wait: int) -> str:
    """What a process has put there. Asked for again and again, so that Ctrl-C is heard."""
    began = told = time.monotonic()
    while True:
        try:
            return _client().blocking_key_value_get(f"{place}/{index}", 1000 * min(wait, 5))
        except jax.errors.JaxRuntimeError as error:
            now = time.monotonic()
            if not _is_late(error):
                raise RunAgain(f"lost {host(0)}, by which the processes speak, at {name!r} "
                               f"({str(error).splitlines()[0][:200]})") from error
            if now - began >= wait:
                raise RunAgain(f"waited {now - began:.0f} s at {name!r} for {host(index)}; see what its log "
                               "says") from error
        if now - told >= PATIENCE and is_writer():
            tell(f"eso-jax: waiting at {name!r} for {host(index)}")
            told = now


def _is_late(error: Exception) -> bool:
    """Whether the store was there, and what was asked for was not."""
    return "DEADLINE_EXCEEDED" in str(error)


def _silent(wait: int = 5) -> str:
    """Who gives no sign when something that the processes did together went wrong, so that all of them should ask.

    Process 0 keeps the store by which they speak: without it, it is the one.
    """
    client, place, until = _client(), "eso_jax/still here", time.monotonic() + wait
    try:
        client.key_value_set(f"{place}/{jax.process_index()}", "yes", allow_overwrite=True)
        while True:
            here = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(place)}
            silent = [host(index) for index in range(jax.process_count()) if index not in here]
            if not silent or time.monotonic() > until:
                return ", ".join(silent)
            time.sleep(0.2)
    except jax.errors.JaxRuntimeError:
        return host(0)


def _no_sign() -> str:
    """The same as part of a sentence."""
    silent = _silent() if jax.process_count() > 1 else ""
    return f"no sign of {silent}; " if silent else ""


def agreed(name: str, problem: str | None) -> str | None:
    """The first process's problem, if any has one; all must ask. So that they go on, or stop, together."""
    for index, found in enumerate(gathered(name, problem or "")):
        if found:
            return found if jax.process_count() == 1 else f"{host(index)}: {found}"
    return None


def by_writer(name: str, action: Callable[[], None]) -> None:
    """Has the writer do something while the others wait; its EsoError or RunAgain is raised in all of them."""
    problem = ""
    if is_writer():
        try:
            action()
        except (EsoError, RunAgain) as error:
            problem = f"{'mistake' if isinstance(error, EsoError) else 'again'}:{error}"
    kind, _, problem = gathered(name, problem)[0].partition(":")
    if kind:
        raise EsoError(problem) if kind == "mistake" else RunAgain(problem)


_turns: dict[str, int] = {}  # how often each name was used: JAX wants new ones


def _turn(name: str) -> int:
    _turns[name] = _turns.get(name, 0) + 1
    return _turns[name]


class Preemption:
    """Whether the run was asked to stop by SIGTERM.

    All processes of a run learn of it, whichever got the signal, and stop behind the same step: JAX's preemption
    service sees to that, and takes the signal over.
    """

    def __init__(self) -> None:
        self._asked = False

    @contextmanager
    def watched(self) -> Iterator[Preemption]:
        """Takes SIGTERM over for its block, where Python allows it (in the main thread)."""
        ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if not ours:
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def asked(self, step: int) -> bool:
        """Whether to stop behind this step; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def together(last: Callable[[], str] = lambda: "the last checkpoint is still there") -> Iterator[None]:
    """Of several processes, ends this one on an error in its block: the others may stand in a step that will not
    finish, and Python would wait for them at its end. They find out by themselves."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if is_loss(error):
            reason = str(error).splitlines()[0][:200]
            leave(RunAgain(f"lost another process of the run ({reason}); {_no_sign()}{last()}"))
        leave(error)


# What JAX, Gloo, NCCL and Orbax say when another process is gone. Other errors of theirs (no memory, say) would only
# come again.
_LOSS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "Connection closed", "Barrier")


def is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective or a barrier raises when another process is gone."""
    return jax.process_count() > 1 and any(sign in str(error) for sign in _LOSS)


class Watchdog:
    """Ends the process when a step in its block hangs (a peer is gone, a device or a file system does not answer), with
    the stacks of all threads, for the launcher to start it again.

    Args:
      seconds: how long a step may take; 0: any time.
      last: says which checkpoint is the last.
    """

    def __init__(self, seconds: int, last: Callable[[], str]) -> None:
        self._seconds, self._last = seconds, last
        self._deadline: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def begin(self) -> None:
        """A step begins, and the one before is over."""
        self._deadline = time.monotonic() + self._seconds

    def rest(self) -> None:
        """What follows is no step: compiling, evaluating, saving."""
        self._deadline = None

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                faulthandler.dump_traceback(all_threads=True)
                last_resort = threading.Timer(90, os._exit, (RunAgain.EXIT,))  # what hangs may be the file system
                last_resort.daemon = True
                last_resort.start()
                leave(RunAgain(f"a step took longer than train.hang_seconds = {self._seconds}; {_no_sign()}"
                               f"{self._last()}"))


def leave(error: BaseException) -> NoReturn:
    """Ends the process with the exit code of the command line; without its peers, if they do not come to the end."""
    code, said = ending(error)
    if code == 1:
        tell("".join(traceback.format_exception(error)))
    tell(f"eso-jax: {socket.gethostname()}: {said}")
    if jax.distributed.is_initialized() and code != 130:  # all may be leaving: then none should find the others gone
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(10)
    os._exit(code)
