"""Checkpoints, by Orbax: `W/checkpoints/STEP/`, written in the background, whole or not at all.

A checkpoint holds named parts that can be read apart: `params`, `ema`, `optimizer`, `step` (the step and the model's
length, which no parameter shows) and `data` (the position of the data iterator). An imported model has `params` and
`step` alone, at step 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eso_jax.config import EsoError, ModelConfig, require


def open_checkpoints(workdir: Path, keep: int | None = None) -> Any:
    """An Orbax Checkpointer of a work directory, a context manager; `.latest` is the newest step, or None.

    With `keep`, for writing: the last `keep` steps are kept, and what a killed process left half-written is removed.
    Without, for reading: nothing is touched, so that a run in progress can be read.
    """
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        (workdir / "checkpoints").absolute(), cleanup_tmp_directories=keep is not None,
        preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1))


def exists(workdir: Path) -> bool:
    """Whether a work directory holds a whole checkpoint."""
    if not (workdir / "checkpoints").is_dir():
        return False
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.latest is not None


def load(checkpoints: Any, workdir: Path, config: ModelConfig, parts: dict[str, Any]) -> dict[str, Any]:
    """The newest checkpoint's parts, as `parts` describes them, and its `step`.

    Raises:
      EsoError: it is damaged, lacks a part, or is of another model.
    """
    step = checkpoints.latest.step
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    try:
        loaded = checkpoints.load_checkpointables(step, {**parts, "step": {"step": scalar, "length": scalar}})
    except Exception as error:  # Orbax raises what its storage layers raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise EsoError(f"--workdir = {str(workdir)!r}: checkpoint {step} is damaged, not of this config, or lacks one "
                       f"of {', '.join(parts)} ({reason}); remove checkpoints/{step} to use the one before") from error
    length = int(loaded["step"]["length"])
    require(length == config.length, "model.length", config.length, f"the checkpoint in {workdir} has length {length}")
    return {**loaded, "step": int(loaded["step"]["step"])}


def load_params(workdir: Path, config: ModelConfig, abstract: Any, ema: bool) -> tuple[int, Any]:
    """(step, parameters) of the newest checkpoint: the averaged ones if asked for, which only a trained one has."""
    require(exists(workdir), "--workdir", str(workdir), "holds no checkpoint; train or import a model first")
    with open_checkpoints(workdir) as checkpoints:
        part = "ema" if ema and checkpoints.latest.step > 0 else "params"
        loaded = load(checkpoints, workdir, config, {part: abstract})
        return loaded["step"], loaded[part]


def step_part(step: jax.Array | int, config: ModelConfig) -> dict[str, Any]:
    return {"step": jnp.int32(step), "length": jnp.int32(config.length)}


def save_params(workdir: Path, config: ModelConfig, params: Any) -> None:
    """A checkpoint of parameters alone, at step 0."""
    with open_checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save_checkpointables(0, {"params": jax.tree.map(jnp.asarray, params), "step": step_part(0, config)})
