"""How a run ends early: asked to stop, after the loss of a process, or in a step that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from eso_jax.errors import RunAgain
from eso_jax.run import multihost


class Preemption:
    """Whether the run was asked to stop by SIGTERM.

    Whichever process got the signal, all processes of a run stop after the same step: JAX's preemption service handles
    the signal and agrees on the step.
    """

    def __init__(self) -> None:
        self._asked = False

    @contextmanager
    def watch(self) -> Iterator[Preemption]:
        """Handles SIGTERM in its block, if Python allows it (in the main thread)."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def is_asked(self, step: int) -> bool:
        """Whether to stop after this step; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def together(last: Callable[[], str] = lambda: "the last checkpoint is still there") -> Iterator[None]:
    """In a run of several processes, ends this one at once on an error in its block: the others may hang in a step, and
    Python would wait for them at its end. They notice by themselves that this one is gone."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if is_loss(error):
            reason = str(error).splitlines()[0][:200]
            multihost.leave(RunAgain(f"lost another process of the run ({reason}); "
                                     f"{multihost.who_is_silent()}{last()}"))
        multihost.leave(error)


# In messages of JAX, Gloo, NCCL and Orbax when another process is gone. Their other errors (no memory, for example)
# would only occur again.
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
        """A step begins: the time is counted from now."""
        self._deadline = time.monotonic() + self._seconds

    def rest(self) -> None:
        """The step is over: compiling, evaluating and saving are not timed."""
        self._deadline = None

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                faulthandler.dump_traceback(all_threads=True)
                last_resort = threading.Timer(90, os._exit, (RunAgain.EXIT,))  # what hangs may be the file system
                last_resort.daemon = True
                last_resort.start()
                multihost.leave(RunAgain(f"a step took longer than train.hang_seconds = {self._seconds}; "
                                         f"{multihost.who_is_silent()}{self._last()}"))
