"""Checkpoints, by Orbax: `W/checkpoints/STEP/`, written in the background, whole or not at all.

A checkpoint holds named parts that can be read apart: `params`, `ema`, `optimizer`, `step` and `data` (the position of
the data iterator). An imported model has `params` alone, or `params` and `ema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from eso_jax.config import EsoError


def open_checkpoints(workdir: Path, keep: int = 1) -> Any:
    """An Orbax Checkpointer of a work directory, a context manager; `.latest` is the newest step, or None.

    Keeps the last `keep` steps. What a killed process left half-written is ignored and removed.
    """
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        (workdir / "checkpoints").absolute(), preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1))


def load_params(workdir: Path, abstract: Any, ema: bool) -> tuple[int, Any]:
    """(step, parameters) of the newest checkpoint: the averaged ones if asked for and there, else the raw ones."""
    with open_checkpoints(workdir) as checkpoints:
        if checkpoints.latest is None:
            raise EsoError(f"--workdir = {str(workdir)!r}: holds no checkpoint; train or import a model first")
        step = checkpoints.latest.step
        part = "ema" if ema and (workdir / "checkpoints" / str(step) / "ema").exists() else "params"
        return step, checkpoints.load_checkpointables(step, {part: abstract})[part]


def save_params(workdir: Path, params: Any) -> None:
    """A checkpoint of parameters alone, at step 0."""
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save_checkpointables(0, {"params": jax.tree.map(jax.numpy.asarray, params)})
