"""Attention: which backend computes it.

The transformer calls `attend` in every layer. It asks the `BACKENDS`, in their order, whether they can compute the
pattern (eso_jax/model/masks.py); the first that does not refuse computes it.

  cudnn   NVIDIA GPUs: cuDNN's fused attention
  splash  TPUs: the Pallas kernel that comes with JAX
  plain   everywhere, and every pattern

The decoding loop's cache (eso_jax/model/cache.py) is kept by the first of the `KEEPERS` that does not refuse:

  triton  NVIDIA GPUs: a kernel for a step's few slots
  plain   everywhere

Axes: B batch, S slots of a pass, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.model.backend import Backend, Task
from eso_jax.model.cudnn import CuDNN
from eso_jax.model.masks import OwnSteps, Pattern, TwoStreams, View
from eso_jax.model.plain import Plain
from eso_jax.model.splash import Splash
from eso_jax.model.triton import Triton

AUTO = "auto"  # the first backend that can
BACKENDS: tuple[Backend, ...] = (CuDNN(), Splash(), Plain())
KEEPERS: tuple[Plain, ...] = (Triton(), Plain())


def attend(q: Float[Array, "B S H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"], view: View,
           wanted: str = AUTO) -> Float[Array, "B S H K"]:
    """Attention within one pass, by the backend that is called `wanted`, or by the first that can."""
    pattern, slots = view.pattern, q.shape[1]
    length = pattern.length(slots) if isinstance(pattern, TwoStreams) else slots
    if isinstance(pattern, OwnSteps):  # no kernel has it
        wanted = Plain.name
    backend, _ = choose(Task(pattern, length, q.shape[3], q.dtype), wanted)
    compute = backend.two_streams if isinstance(pattern, TwoStreams) else backend.one_stream
    return sharding.locally(compute, (q, k, v), view)


def keeper(config: ModelConfig, pattern: Pattern, dtype: Any, wanted: str = AUTO) -> Plain:
    """The backend that keeps the decoding loop's cache on the mesh in force: "plain" if that is wanted, else the first
    of the `KEEPERS` that can."""
    wanted = wanted if wanted == Plain.name else AUTO
    backend, _ = choose(Task(pattern, config.length, config.head_size, jnp.dtype(dtype)), wanted, KEEPERS)
    assert isinstance(backend, Plain)
    return backend


def choose(task: Task, wanted: str = AUTO, backends: Sequence[Backend] | None = None) -> tuple[Backend, dict[str, str]]:
    """(the backend for a task, the reasons of those that refused it, by name).

    The backend is the one called `wanted`, or `plain` if that one refuses; with "auto" the first that does not refuse.
    """
    refusals: dict[str, str] = {}
    for backend in BACKENDS if backends is None else backends:
        if wanted in (AUTO, backend.name) or isinstance(backend, Plain):
            reason = backend.refuse(task)
            if reason is None:
                return backend, refusals
            refusals[backend.name] = reason
    raise AssertionError("plain refuses nothing")


def describe(patterns: Iterable[Pattern | TwoStreams], config: ModelConfig, dtype: Any, wanted: str = AUTO) -> str:
    """The names of the backends that compute these patterns on the mesh in force, for a message; with the reason, if it
    is not the platform's own kernel."""
    answers: dict[str, None] = {}  # each once, in order
    for pattern in patterns:
        backend, refusals = choose(Task(pattern, config.length, config.head_size, jnp.dtype(dtype)), wanted)
        reasons = [f"{name}: {reason}" for name, reason in refusals.items()
                   if wanted != AUTO or not reason.startswith("for ")]
        answers[backend.name + (f" ({'; '.join(reasons)})" if reasons else "")] = None
    return ", ".join(answers)
