"""Figure 16: what a training step costs, by family.

Command:   python experiments/tables/figure_16_training_speed.py --scale smoke

The figure has no numbers; the text says how much longer than MDLM an Eso-LM of alpha_0 < 1 takes, half of whose batch
has two streams, and that one of alpha_0 = 1 takes the same. Families take turns, step by step, and medians count: at
--scale paper eight models and their batches of 512 x 1024 tokens are held at once, which takes a host of several large
GPUs.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eso_jax import sharding
from eso_jax.config import MeshConfig
from eso_jax.run import train
from eso_jax.run.train import TrainState
from lab import RUNS, Cell, Lab, Table, main

MODELS = {"MDLM": "owt/mdlm", "AR": "owt/ar", "Eso-LM, alpha_0 = 1": "owt/esolm_1",
          "Eso-LM, alpha_0 = 0.5": "owt/esolm_05", "Eso-LM, alpha_0 = 0": "owt/esolm_0",
          "Eso-LM (A), alpha_0 = 0.5": "owt/esolm_a_05", "BD3-LM, L' = 4": "owt/bd3lm_4",
          "BD3-LM, L' = 16": "owt/bd3lm_16"}
STEPS = 20


def run(lab: Lab) -> None:
    configs = {name: lab.config(run).to_json() for name, run in MODELS.items()}
    seconds: dict[str, list[float]] = lab.measure_all("figure-16", {"steps": STEPS, **configs}, lambda: measure(lab))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    config = lab.config(MODELS["MDLM"])
    tokens = config.train.batch_size * config.model.length
    rows: list[list[Cell]] = [[name, RUNS[run].step_time, median[name] / median["MDLM"], 1000 * median[name],
                               round(tokens / median[name])] for name, run in MODELS.items()]
    table = Table(["family", "paper, times MDLM", "ours, times MDLM", "ours, ms per step", "ours, tokens/s"], rows)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        at = np.arange(len(MODELS))
        axes.barh(at, [median[name] / median["MDLM"] for name in MODELS], label="ours")
        axes.plot([RUNS[run].step_time for run in MODELS.values()], at, "k|", markersize=16, label="paper")
        axes.set(xlabel="time of a training step, in MDLM's", yticks=at, yticklabels=list(MODELS))
        axes.invert_yaxis()
        axes.legend()

    lab.report("figure_16_training_speed", __doc__ or "", {"": table},
               [f"Batches of {config.train.batch_size} x {config.model.length} tokens, {STEPS} steps each."], draw)


def measure(lab: Lab) -> dict[str, list[float]]:
    """Seconds of each of STEPS steps on random tokens, compiled before."""
    states: dict[str, TrainState] = {}
    steps: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    mesh = sharding.mesh(MeshConfig())
    for name, run in MODELS.items():
        config = lab.config(run)
        tokens = rng.integers(0, 100, (config.train.batch_size, config.model.length), dtype=np.int32)
        batch = sharding.put_rows(tokens, mesh, len(tokens))
        with jax.set_mesh(mesh):
            states[name] = train.begin(config, mesh)
            steps[name] = functools.partial(_step, train.jit_step(config, mesh), batch)
            states[name], _ = steps[name](states[name])
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            for name in MODELS:
                states[name], took = steps[name](states[name])
                seconds[name].append(took)
    return seconds


def _step(step: Any, batch: jax.Array, state: TrainState) -> tuple[TrainState, float]:
    begin = time.perf_counter()
    state, _ = step(state, batch)
    jnp.asarray(state.step).block_until_ready()
    return state, time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
