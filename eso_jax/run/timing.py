"""Wall time, with compilation apart, and in words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax.monitoring

_COMPILE_EVENTS = {f"/jax/core/compile/{stage}_duration"
                   for stage in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")}


class Stopwatch:
    """A context manager that times its block.

    Attributes:
      seconds: wall time of the block.
      compile_seconds: the part of it that JAX spent tracing, lowering or compiling.
    """

    def __enter__(self) -> Stopwatch:
        self._compiling: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._begin
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self.compile_seconds, covered = 0.0, self._begin
        for low, high in sorted(self._compiling):  # one may lie in another: each moment counts once
            self.compile_seconds += max(0.0, high - max(low, covered))
            covered = max(covered, high)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _COMPILE_EVENTS:
            now = time.perf_counter()
            self._compiling.append((now - duration_secs, now))


def wait_for(turn: Path | None) -> None:
    """Waits until the file `turn` exists; None: does not wait. So several measurements can compile side by side and be
    timed one after another."""
    while turn is not None and not turn.exists():
        time.sleep(0.05)


def in_words(seconds: float) -> str:
    """A duration, roughly: "40 seconds", "7 minutes", "2.5 hours", "3 days"."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.{0 if unit == 'minute' or count >= 10 else 1}f} {unit}s"
    return f"{max(2, round(seconds))} seconds"
