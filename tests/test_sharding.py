"""Sampling on a mesh of eight emulated devices: the same tokens however the batch and the heads are split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from conftest import GOLDENS, emulated
from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.errors import EsoError

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import eso_jax
from eso_jax import families
from eso_jax.decoding import check, loop, passes
from eso_jax.decoding.order import sort
workdir, out = sys.argv[1:]
found = {}
for tensor in (1, 4):
    model = eso_jax.load(workdir, tensor=tensor)
    assert dict(model.mesh.shape) == {
        "data": jax.device_count() // tensor, "fsdp": 1, "tensor": tensor} or jax.device_count() == 1
    samples = model.sample(6, steps=6, alpha_0=0.5, batch_size=6)
    sampler = families.get(model.config).sampler(model.config)
    x = sort(jnp.asarray(np.arange(6 * 16).reshape(6, 16) % 32), samples.plan.order)
    with jax.set_mesh(model.mesh):
        eight = samples.plan.rows(np.arange(8) % 6)
        state = loop.start(model.weights, model.config.model, sampler, eight)
        state = loop.grow(state, passes.schedule(eight, sampler)[0].shape)
        if jax.device_count() > 1:
            shares = {(model.mesh.shape["data"], model.mesh.shape["tensor"])}
            assert shares == {(x.shape[0] // x.sharding.shard_shape(x.shape)[0],
                               x.shape[1] // x.sharding.shard_shape(x.shape)[1]) for x in jax.tree.leaves(state.cache)}
            assert state.tokens.sharding.shard_shape((8, 16)) == (8 // model.mesh.shape["data"], 16)
        logits = check.forced_logits(model.weights, model.config.model, sampler, eight, x[np.arange(8) % 6])
        found |= {f"tokens{tensor}": samples.tokens, f"logits{tensor}": np.concatenate(list(logits), axis=1)}
    if jax.device_count() == 1:
        break
np.savez(out, **found)
"""


def test_any_mesh_draws_the_same_tokens(tmp_path: Path) -> None:
    """Eight devices on the data axis; two copies of the model on four each, whose logits agree to 1e-5."""
    subprocess.run([sys.executable, "-m", "eso_jax", "import", str(GOLDENS / "eso_tiny.safetensors"), "--config",
                    str(GOLDENS / "config.json"), "--out", str(tmp_path / "w")], check=True, capture_output=True)
    for count in (1, 8):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "w"), str(tmp_path / f"{count}.npz")],
                              capture_output=True, text=True, env=emulated(count))
        assert done.returncode == 0, done.stderr
    one, eight = np.load(tmp_path / "1.npz"), np.load(tmp_path / "8.npz")
    for tensor in (1, 4):
        np.testing.assert_array_equal(eight[f"tokens{tensor}"], one["tokens1"])
        np.testing.assert_allclose(eight[f"logits{tensor}"], one["logits1"], atol=1e-5, rtol=1e-5)


def test_meshes_that_do_not_fit_are_refused() -> None:
    for tensor in (0, jax.device_count() + 1):
        with pytest.raises(EsoError, match=f"tensor = {tensor}: must divide the"):
            sharding.inference_mesh(ModelConfig(), tensor)


def test_constrain_without_a_mesh_does_nothing() -> None:
    x = jax.numpy.zeros((2, 3))
    assert sharding.constrain(x, "data", "tensor") is x
