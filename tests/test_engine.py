"""The engine: whatever the devices and the batch size, every row passes once and the numbers are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import engine_numbers
from conftest import emulated, engine, random_params, random_weights, tiny_config
from eso_jax import noise
from eso_jax.config import Config, ModelConfig
from eso_jax.data import ByteTokenizer
from eso_jax.engine import perplexity
from eso_jax.engine.rows import catch_out_of_memory
from eso_jax.errors import EsoError
from eso_jax.run import workdir

SCRIPT = Path(engine_numbers.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one device, four and eight make of the same rows."""
    out = tmp_path_factory.mktemp("engine") / "found.json"
    meshes = ["1x1x1", "4x1x1", "1x4x1", "1x1x4", "2x1x4", "8x1x1", "1x8x1", "2x2x2"]
    done = subprocess.run([sys.executable, str(SCRIPT), str(out), *meshes], capture_output=True, text=True,
                          env=emulated(8))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.read_text()))


@pytest.mark.slow
def test_numbers_depend_on_neither_devices_nor_batch_size(found: dict[str, Any]) -> None:
    """One device takes all eight rows at once, four devices two each, and two copies on four devices each three rows
    (of four) after three."""
    one = found["1x1x1"]["numbers"]
    assert set(one) == {"eval", "score", "plan", "conditionals", "judge", "features", "sample", "given"}
    for mesh in ("4x1x1", "2x1x4"):
        for name, value in found[mesh]["numbers"].items():
            jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(
                ours, theirs, rtol=1e-5, atol=1e-5, err_msg=f"{name} on {mesh}"), value, one[name])


@pytest.mark.slow
def test_devices_share_the_work(found: dict[str, Any]) -> None:
    """Operations of one device of four, for rows that they divide among them."""
    one, four = (found[mesh]["flops"] for mesh in ("1x1x1", "4x1x1"))
    for name in one:
        assert 0 < four[name] <= 1.1 / 4 * one[name], name


@pytest.mark.slow
def test_any_number_of_windows_is_evaluated_on_any_mesh(found: dict[str, Any]) -> None:
    """1 to 13 windows, in batches of 4 where the devices allow, as training's validation does it."""
    assert len(found) == 8 and all(len(values["sweep"]) == 13 for values in found.values())
    for mesh, values in found.items():
        for rows, value in values["sweep"].items():
            np.testing.assert_allclose(value, found["1x1x1"]["sweep"][rows], rtol=1e-5, err_msg=f"{rows} on {mesh}")


@pytest.mark.slow
def test_the_heads_gradient_does_not_depend_on_the_mesh(found: dict[str, Any]) -> None:
    """In bfloat16, in one chunk and in 512, within 0.5% of that in float32."""
    for mesh, values in found.items():
        assert len(values["head"]) == 2 and max(values["head"].values()) <= 5e-3, (mesh, values["head"])


def test_batches_are_few_equal_and_divide_over_the_devices() -> None:
    one = engine(tiny_config(), random_weights(tiny_config().model))

    class Mesh:
        shape = {"data": 2, "fsdp": 3, "tensor": 4}

    object.__setattr__(one, "mesh", Mesh())

    def size(rows: int, batch_size: int) -> int:
        return one.size(rows, batch_size)

    assert size(1, 64) == 6 and size(64, 64) == 66 and size(66, 64) == 66
    assert size(67, 64) == 36 and size(600, 6) == 6 and size(5, 1) == 6


def test_rows_come_back_in_order_without_the_padding() -> None:
    config = tiny_config()
    model = engine(config, random_weights(config.model), 4)
    seen: list[list[int]] = []

    def read(rows: np.ndarray) -> tuple[np.ndarray]:
        seen.append(rows.tolist())
        return (np.stack([rows, rows**2], axis=1).astype(np.int32),)

    out = model.rows(lambda weights, x: {"twice": 2 * x, "sum": x.sum(1)}, 6, read)
    assert seen == [[0, 1, 2], [3, 4, 5]]
    assert out["twice"].tolist() == [[2 * n, 2 * n * n] for n in range(6)] and out["sum"].shape == (6,)
    seen.clear()
    assert model.rows(lambda weights, x: x[:, 0], 5, read).tolist() == [0, 1, 2, 3, 4]
    assert seen == [[0, 1, 2], [3, 4, 3]]
    with pytest.raises(EsoError, match="batch_size = 0: must be at least 1"):
        engine(config, model.weights, 0)


@pytest.mark.parametrize("where", ["read", "function"])
@pytest.mark.parametrize(("stop", "keep", "kept"), [(3, True, 4), (3, False, None), (1, True, None)])
def test_an_interrupt_keeps_the_batches_that_are_done(stop: int, keep: bool, kept: int | None, where: str) -> None:
    """Only if that is asked for, and if there are any; wherever in a turn it comes."""
    config, batches = tiny_config(), iter(range(1, 5))
    model = engine(config, random_weights(config.model), 2)

    def interrupt(here: str) -> None:
        if here == where and next(batches) == stop:
            raise KeyboardInterrupt

    def function(_: Any, rows: jax.Array) -> jax.Array:
        interrupt("function")
        return rows

    def read(rows: np.ndarray) -> list[np.ndarray]:
        interrupt("read")
        return [rows.astype(np.int32)]

    def rows() -> Any:
        return model.rows(function, 7, read, keep=keep)

    if kept is None:
        pytest.raises(KeyboardInterrupt, rows)
    else:
        assert rows().tolist() == list(range(kept))


def test_out_of_memory_is_one_line_with_the_remedy() -> None:
    config = tiny_config()
    model = engine(config, random_weights(config.model))
    with pytest.raises(EsoError, match=r"batch_size = 1: not enough memory on a device \(.*\); give a smaller"):
        model.rows(lambda weights, x: jax.numpy.zeros((1, 2**45)), 1, lambda rows: (rows.astype(np.int32),))
    with pytest.raises(jax.errors.JaxRuntimeError), catch_out_of_memory("x", "y"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


LOADING = """
import math, sys
import jax, jax.numpy as jnp
import eso_jax
from eso_jax import sharding
from eso_jax.model import params as declared
from eso_jax.run import workdir

def most():
    '''Bytes of live arrays on the device that holds most.'''
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        for device in array.sharding.device_set:
            held[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return max(held.values())

def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

read, made = workdir.read, []
def spied_read(*arguments):
    found = read(*arguments)
    made.append((size(found[2]), most()))
    return found
workdir.read = spied_read
folds = declared.inference_folds
def spied_folds(*arguments):
    blocks, head = folds(*arguments)
    def after(kernel):
        made.append(most())  # between the two
        return head(kernel)
    return blocks, after
declared.inference_folds = spied_folds
model = eso_jax.load(sys.argv[1], tensor=4)
declared.inference_folds = folds
(params, most_read), most_between, weights = *made, size(model.weights)
assert most_read <= 1.1 * params / 4, (most_read, params)
assert most_between <= 1.1 * weights / 4, (most_between, weights)
assert most() <= 1.1 * weights / 4, (most(), weights)  # and the parameters are gone
kernel = model.weights.head.kernel
assert kernel.shape == (64, 1032) and kernel.sharding.shard_shape(kernel.shape) == (64, 258)
assert model.weights.embedding.sharding.shard_shape((1030, 64)) == (1030, 16)
shapes = jax.eval_shape(lambda: declared.init_params(model.config.model, jax.random.key(0)))
where = declared.with_shardings(shapes, model.mesh)
folds, kernel = declared.inference_folds(model.config.model, jnp.float32, model.mesh), where["head_kernel"]
layer, head = (fold.lower(*x).compile().memory_analysis() for fold, x in zip(folds, ((where, 0), (kernel,))))
blocks = model.config.model.layers * layer.output_size_in_bytes
assert params / 4 + blocks + layer.temp_size_in_bytes <= 1.1 * (params + weights) / 4, (layer, params, weights)
held = blocks + (size(model.weights.embedding) + 64 * 1030 * 4) / 4 + head.output_size_in_bytes
assert held + head.temp_size_in_bytes <= 1.1 * (params + weights) / 4, (head, params, weights)
assert (model.sample(3, steps=4, seed=0).tokens < 1029).all()  # the mask is the last id, and what pads the head is none
"""


@pytest.mark.slow
def test_loading_puts_no_more_than_its_share_on_a_device(tmp_path: Path) -> None:
    model = ModelConfig(length=8, vocab_size=1030, width=64, layers=2, heads=4, cond_dim=4, dropout=0.0)
    workdir.create(tmp_path / "w", Config(model=model), random_params(model))
    done = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path / "w")], capture_output=True, text=True,
                          env=emulated(4))
    assert done.returncode == 0, done.stderr


def test_an_evaluations_times_do_not_follow_the_corpus() -> None:
    """Times are spread evenly over all draws, and over each window's own; which window has which is chance."""
    seen = set()
    for seed in range(60):
        ranks = perplexity.time_ranks(jax.random.key(seed), 8, 3)
        assert sorted(ranks.ravel().tolist()) == list(range(24))
        assert (ranks // 8 == np.arange(3)).all()
        seen.add(int(ranks[0, 0]))
    assert seen == set(range(8))


def test_the_bound_does_not_depend_on_the_order_of_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them cost nothing, half of them 2 t at time t: sorted, either way, and mixed."""
    class Toy:
        @staticmethod
        def nelbo(weights: Any, config: Config, tokens: jax.Array, draws: noise.Draws, alpha_0: float) -> dict:
            return {"diffusion": 2 * noise.draw_times(draws) * tokens.sum(1)}

    monkeypatch.setattr(perplexity.families, "get", lambda config: Toy)
    config = tiny_config("mdlm", length=5)
    model = engine(config, random_weights(config.model), 256)  # compiled for nobody else
    easy, hard = np.zeros((128, 5), np.int32), np.ones((128, 5), np.int32)
    mixed = np.stack([easy, hard], 1).reshape(-1, 5)
    for windows in (np.concatenate([easy, hard]), np.concatenate([hard, easy]), mixed):
        found = [perplexity.nelbo(model, windows, ByteTokenizer(), 1.0, jax.random.key(seed)) for seed in range(4)]
        mean = np.mean([one.nats_per_token for one in found])
        assert abs(mean - 0.5) < 4 * found[0].standard_error / 2, mean
