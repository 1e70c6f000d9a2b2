"""Checkpoints, by Orbax: `W/checkpoints/STEP/`, written in the background, whole or not at all, verified when read.

A checkpoint holds named parts that can be read apart, on any mesh and by any number of processes: `params`, `ema`,
`optimizer`, and `step` (the step, where the data stands as well; the model's length, which no parameter shows; and a
fingerprint of each part). An imported model has `params` and `step` alone, at step 0.

A checkpoint that is broken, or whose values are not those that were saved, is skipped for the one before. If storage
does not answer, no checkpoint is skipped: the read is tried again, and then the run ends with RunAgain.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eso_jax.config import ModelConfig
from eso_jax import files
from eso_jax.console import is_writer, say
from eso_jax.errors import EsoError, RunAgain, reason_of, require
from eso_jax.run import multihost, stopping

PARTS = ("params", "ema", "optimizer")


@contextlib.contextmanager
def open_checkpoints(workdir: Path, keep: int | None = None, keep_every: int | None = None) -> Iterator[Any]:
    """An Orbax Checkpointer of a work directory.

    With `keep`, for writing: the last `keep` steps are kept, and each that `keep_every` divides; what a killed process
    left half-written is removed. Without, for reading: nothing is touched, so that a run in progress can be read.
    """
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    policy = policies.PreserveAll() if keep is None else policies.LatestN(keep)
    if keep_every is not None:
        policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])
    checkpoints = ocp.training.Checkpointer(
        (workdir / "checkpoints").absolute(), cleanup_tmp_directories=keep is not None, preservation_policy=policy,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1))
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    with _without_closed_loops():
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):  # a failed save has been reported already
                checkpoints.close()
            raise
        checkpoints.close()


@contextlib.contextmanager
def _without_closed_loops() -> Iterator[None]:
    """No tracebacks of the files that a failed save was still writing: each of them meets its closed event loop."""
    hook = sys.unraisablehook

    def say_others(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = say_others
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """A log filter that drops Orbax's lines: its errors are raised, and reported here in one line."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, ascending."""
    folder = workdir / "checkpoints"
    found = list(os.scandir(folder)) if folder.is_dir() else []
    return sorted(int(entry.name) for entry in found if entry.name.isdigit() and not _is_file(entry))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # storage does not answer about it: `_read` asks again, in all processes
        return False


def agreed_steps(workdir: Path) -> list[int]:
    """`steps` as the writer sees them: a shared file system may show other processes an older state. All processes must
    call it."""
    return [int(step) for step in multihost.gather("steps", " ".join(map(str, steps(workdir))))[0].split()]


def last(workdir: Path) -> str:
    """A message about the last checkpoint."""
    saved = steps(workdir)
    return f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"


def fingerprint(tree: Any) -> int:
    """A checksum of arrays of 32-bit numbers: one changed bit always changes it, several do almost certainly. It is the
    same on every mesh.

    The sum, modulo 2**32, of each number as an integer times an odd number made of its place.
    """
    # On CPU the arrays are in this memory, and a program would usually take longer to compile than the sum takes.
    at_hand = jax.default_backend() == "cpu" and jax.device_count() == 1
    with np.errstate(over="ignore"):
        return int(_weighted_sum(jax.device_get(tree)) if at_hand else jax.jit(_weighted_sum)(tree))


def _weighted_sum(tree: Any) -> Any:
    total = np.uint32(0)
    for number, x in enumerate(jax.tree.leaves(tree)):
        of = x.__array_namespace__()  # numpy or jax.numpy
        place = of.zeros(x.shape, np.uint32)  # in the flattened array; by axis, so that no device makes all of them
        for axis, size in enumerate(x.shape):
            place = place * size + of.arange(size, dtype=np.uint32).reshape(*[1] * axis, -1, *[1] * (x.ndim - 1 - axis))
        total += (2 * number + 1) * of.sum(x.view(np.uint32) * (2 * place + 1), dtype=np.uint32)
    return total


def load(checkpoints: Any, workdir: Path, config: ModelConfig, parts: dict[str, Any],
         mend: bool = False) -> dict[str, Any]:
    """The parts of the newest whole checkpoint, and its `step`.

    Args:
      parts: of each part to be read, by its name, the shapes, dtypes and shardings.
      mend: rename damaged checkpoints to `damaged-STEP`, so that training can write these steps again.

    Raises:
      EsoError: no checkpoint is whole, has the parts and is of this model.
      RunAgain: a checkpoint cannot be read now, and may not be damaged. It is left as it is.
    """
    sharding = jax.tree.leaves(parts)[0].sharding
    sharding = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding
    about = {"step": jnp.int32, "length": jnp.int32, **{name: jnp.uint32 for name in PARTS}}
    scalars = {name: jax.ShapeDtypeStruct((), dtype, sharding=sharding) for name, dtype in about.items()}
    saved = agreed_steps(workdir)
    problems: dict[int, str] = {}
    for step in reversed(saved):
        loaded, problem = _read(checkpoints, workdir, step, parts, {**parts, "step": scalars})
        if problem is None:
            for damaged, why in problems.items():
                say(f"warning: checkpoint {damaged} in {workdir} is damaged, or lacks one of {', '.join(parts)} "
                    f"({why}); using {step}")
                if mend:
                    multihost.by_writer("mend", functools.partial(_set_aside, workdir / "checkpoints", damaged))
            if mend and problems:
                checkpoints.reload()
            length = int(loaded["step"]["length"])
            require(length == config.length, "model.length", config.length,
                    f"the checkpoint in {workdir} has length {length}")
            return {**{name: loaded[name] for name in parts}, "step": int(loaded["step"]["step"])}
        problems[step] = problem
    raise EsoError(f"--workdir = {str(workdir)!r}: none of its checkpoints ({', '.join(map(str, saved))}) is whole, "
                   f"has {', '.join(parts)} and is of this config ({next(iter(problems.values()))}); train in another "
                   "--workdir, or restore this one from a copy")


def _read(checkpoints: Any, workdir: Path, step: int, parts: dict[str, Any], abstract: Any) -> tuple[Any, str | None]:
    """(a checkpoint as `abstract` describes it, None), or (None, what is damaged in it); the same in all processes.

    Storage that does not answer is asked again, since on a network a moment later all may be well.
    """
    for attempt in range(1, files.TRIES + 1):
        loaded, damage, failure = None, "", None
        with _silence():
            try:
                loaded = checkpoints.load_checkpointables(step, abstract)
                wrong = [name for name in parts if fingerprint(loaded[name]) != int(loaded["step"][name])]
                damage = f"{', '.join(wrong)}: not what was saved" if wrong else ""
            except Exception as error:  # Orbax raises what its storage layers raise
                damage, failure = (reason_of(error), None) if _is_damage(error) else ("", error)
            if loaded is None:
                gc.collect()  # here, where the warnings of Orbax's unfinished tasks are silenced
        # A process that cannot read leaves the others waiting at Orbax's barrier: its error counts, not theirs.
        damages = list(filter(None, multihost.gather("damage", damage)))
        if damages:
            return None, damages[0]
        reasons = multihost.gather("failure", f"{type(failure).__name__}: {failure}" if failure else "")
        reason = min(filter(None, reasons), key=lambda text: "arrier" in text, default="").partition("\n")[0][:200]
        if not reason:
            return loaded, None
        if "RESOURCE_EXHAUSTED" in reason:  # the devices' memory, which the caller reports
            raise failure or jax.errors.JaxRuntimeError(reason)
        if "arrier" in reason:  # the processes disagree on the number of Orbax's barriers until they start again
            reason = "another process could not read it"
            break
        if attempt < files.TRIES:
            say(f"checkpoint {step} in {workdir} cannot be read ({reason}); trying again")
            time.sleep(files.PAUSE * attempt)
    raise RunAgain(f"--workdir = {str(workdir)!r}: checkpoint {step} could not be read {attempt} times ({reason}); "
                   "nothing says that it is damaged, so it is left as it is; mend the storage and repeat the command")


def _is_damage(error: BaseException) -> bool:
    """Whether an error says that a part of a checkpoint is missing or invalid. All other errors (of storage, a network,
    a device or memory) may be temporary."""
    number = files.errno_of(error)
    if number is not None:
        return number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    passing = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED",
               "UNAUTHENTICATED", "arrier")
    return (isinstance(error, (ValueError, TypeError, LookupError, AttributeError, AssertionError))
            and type(error).__name__ != "StepNotFoundError" and not any(word in str(error) for word in passing))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No tracebacks of the tasks that Orbax leaves unfinished when a read fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda *_: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            yield
    finally:
        sys.unraisablehook = hook


def _set_aside(folder: Path, step: int) -> None:
    """Renames a checkpoint to damaged-STEP, or to damaged-STEP-1 and so on where there is one already."""
    names = (f"damaged-{step}" + (f"-{again}" if again else "") for again in range(1000))
    (folder / str(step)).rename(next(folder / name for name in names if not (folder / name).exists()))


def load_params(workdir: Path, config: ModelConfig, abstract: Any, ema: bool) -> tuple[int, Any]:
    """(step, parameters) of the newest whole checkpoint.

    Args:
      abstract: shapes, dtypes and shardings of the parameters.
      ema: the averaged parameters; the raw ones of an imported model, which has no others.
    """
    saved = steps(workdir)
    require(bool(saved), "--workdir", str(workdir), "holds no checkpoint; train or import a model first")
    with open_checkpoints(workdir) as checkpoints:
        part = "ema" if ema and saved[-1] > 0 else "params"
        loaded = load(checkpoints, workdir, config, {part: abstract})
        return loaded["step"], loaded[part]


class Saver:
    """Saves in the background, one checkpoint at a time, and reports failures.

    A context manager: at the end of its block it waits for the save in progress; if another error in the block was a
    full disk, it raises an EsoError that says so.

    Attributes:
      is_due: the last save failed because storage did not answer, so the present step should be saved.
    """

    def __init__(self, checkpoints: Any, workdir: Path, config: ModelConfig) -> None:
        self._checkpoints, self._workdir, self._config = checkpoints, workdir, config
        self._thread: threading.Thread | None = None
        self._step = self._failures = 0
        self._error: Exception | None = None
        self.is_due = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        if error is None:
            self.wait()
        elif files.errno_of(error) in files.FULL:
            self.wait()  # which says the same, if it met it too
            raise EsoError(f"--workdir = {str(self._workdir)!r}: the disk is full; {last(self._workdir)}; make room "
                           "and repeat the command") from error

    def save(self, step: int, parts: dict[str, Any]) -> None:
        """Copies the parts and returns; `check` raises if the save fails later.

        Raises:
          EsoError: this save could not begin, or the one before failed.
          RunAgain: as `check`.
        """
        self.wait()
        about = {"step": np.array(step, np.int32), "length": np.array(self._config.length, np.int32)}
        about |= {name: np.array(fingerprint(parts[name]) if name in parts else 0, np.uint32) for name in PARTS}
        begin = functools.partial(self._checkpoints.save_checkpointables_async, step, {**parts, "step": about})
        self._step, is_retry, self.is_due = step, self.is_due, False
        try:
            try:
                response = begin()
            except Exception:
                if not is_retry:
                    raise
                response = begin()  # Orbax raised the error of the last save again, and did not begin this one
        except Exception as error:  # whatever its storage layers raise
            self._error = error
        else:
            self._thread = threading.Thread(target=self._finish, args=(response,), daemon=True)
            self._thread.start()
        self.check()

    def finish(self, step: int, parts: dict[str, Any]) -> None:
        """Saves and waits, and tries again if storage does not answer; raises as `save` does."""
        self.is_due = True
        while self.is_due:
            self.save(step, parts)
            self.wait()

    def _finish(self, response: Any) -> None:
        try:
            response.result()
            self._failures = 0
        except Exception as error:  # raised again by `check`, in the main thread
            self._error = error

    def check(self) -> None:
        """Raises an EsoError if the save is known to have failed; a RunAgain if it failed since another process is
        gone, or if storage did not answer several saves in a row."""
        if self._error is None:
            return
        if is_writer():
            for path in (self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        number = files.errno_of(self._error)
        reason = os.strerror(number) if number else reason_of(self._error)
        if stopping.is_loss(self._error) and number is None:
            raise RunAgain(f"lost another process of the run while saving step {self._step} ({reason}); "
                           f"{last(self._workdir)}")
        failure = f"--workdir = {str(self._workdir)!r}: the checkpoint of step {self._step} could not be written"
        if number in files.PASSING:
            self._failures += 1
            # Several processes could not agree on when to save again; after a new start they do.
            if self._failures == files.TRIES or jax.process_count() > 1:
                raise RunAgain(f"{failure} ({reason}); {last(self._workdir)}") from self._error
            say(f"{failure} ({reason}); trying again")
            self._error, self.is_due = None, True
            self._checkpoints.reload()
            time.sleep(files.PAUSE * self._failures)
            return
        full = number in files.FULL or "No space left" in str(self._error)
        raise EsoError(f"{failure} ({'the disk is full' if full else reason}); {last(self._workdir)}; "
                       f"{'make room' if full else 'mend that'} and repeat the command") from self._error

    def wait(self) -> None:
        """Waits for the save in progress; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def last(self) -> str:
        """A message about the last checkpoint; waits up to a minute for a save in progress."""
        if self._thread is not None:
            self._thread.join(60)
        return last(self._workdir)


def save_params(workdir: Path, config: ModelConfig, params: Any) -> None:
    """Writes a checkpoint of parameters alone, at step 0."""
    with open_checkpoints(workdir, keep=1) as checkpoints, Saver(checkpoints, workdir, config) as saver:
        saver.finish(0, {"params": jax.tree.map(jnp.asarray, params)})
