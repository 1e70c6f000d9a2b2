"""Losses of 20 training steps on several meshes; run by tests/test_mesh.py in processes of its own.

    python tests/mesh_losses.py OUT.json FAMILY,... MESH ...    MESH: data,fsdp,tensor of all devices, or 1 (the first)
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from eso_jax import sharding
from eso_jax.config import Config, FamilyConfig, MeshConfig, ModelConfig, TrainConfig
from eso_jax.model import loss, vocabulary
from eso_jax.run import multihost, train

STEPS = 20
BATCH = 32  # two rows of each of an Eso-LM's losses on each of eight devices
# 33 tokens divide by none of the meshes.
MODEL = ModelConfig(length=16, vocab_size=33, width=32, layers=2, heads=4, cond_dim=8, dropout=0.1)
TRAIN = TrainConfig(steps=STEPS, batch_size=16, accumulate=1, learning_rate=5e-3, warmup=5, compute_dtype="float32")


def config_of(family: str, mesh: MeshConfig = MeshConfig()) -> Config:
    fields: dict[str, float] = {"esolm": {"alpha_0": 0.75}, "esolm_a": {"alpha_0": 0.75},
                                "bd3lm": {"block_size": 4}}.get(family, {})
    return Config(MODEL, FamilyConfig(name=family, **fields), train=TRAIN, mesh=mesh)


def leave_out() -> None:
    """Has so short sequences leave out of the loss what long ones do: slots of clean tokens, logits of tokens that are
    not masked. There is so little room that every few steps some row, or on several devices some device, needs more:
    7 slots of 16 are too few for one of 16 rows at alpha_0 = 0.75 in a third of the steps."""
    loss.slots_for = lambda share, length: length * 7 // 16
    vocabulary.room = lambda rows, length, share: rows * length if share == 1 else rows * length * 3 // 4


def losses(config: Config, devices: list[jax.Device]) -> list[float]:
    mesh = sharding.mesh(config.mesh, devices)
    sharding.check(config, mesh)
    rng, size = np.random.default_rng(0), config.train.batch_size
    found = []
    with jax.set_mesh(mesh):
        state, step = train.begin(config, mesh), train.jit_step(config, mesh)
        check_split(config, state)
        for _ in range(STEPS):
            counting = rng.integers(0, 32, (size, 1)) + np.arange(MODEL.length)  # something to learn
            tokens = (counting % 32).astype(np.int32)
            rows = sharding.rows_of_process(mesh, size)
            state, values = step(state, sharding.put_rows(tokens[rows], mesh, size))
            found.append(float(values["loss"]))
        check_split(config, state)
    return found


def check_split(config: Config, state: train.TrainState) -> None:
    """Parameters, averages and both moments are split over fsdp x tensor: no device holds a whole one."""
    parts = config.mesh.fsdp * config.mesh.tensor
    for name in ("qkv", "out", "mlp_in_kernel", "mlp_out_kernel", "embedding", "head_kernel"):
        leaves = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if f"'{name}'" in str(path)]
        assert len(leaves) == 4, name
        for x in leaves:
            assert np.prod(x.sharding.shard_shape(x.shape)) * parts == x.size, (name, x.sharding)


def main() -> None:
    out, names, *meshes = sys.argv[1:]
    if "JAX_NUM_PROCESSES" in os.environ:
        multihost.start(Path(out).with_suffix('.hosts'), 120)
    leave_out()
    found: dict[str, dict[str, list[float]]] = {}
    for family, mesh in itertools.product(names.split(","), meshes):
        alone = mesh == "1"
        axes = MeshConfig() if alone else MeshConfig(*(int(n) for n in mesh.split(",")))
        devices = jax.devices()[:1] if alone else jax.devices()
        config = config_of(family, axes).override(f"train.batch_size={BATCH}", "model.layers=1")  # half to compile
        found.setdefault(family, {})[mesh] = losses(config, devices)
    if multihost.is_writer():
        with open(out, "w") as file:
            json.dump(found, file)
    multihost.barrier("end")


if __name__ == "__main__":
    main()
