"""One run on any mesh: rules, born-sharded state, and losses that depend on no topology."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import mesh_losses
from conftest import USUAL, emulated, tiny_config, together
from eso_jax import families, sharding
from eso_jax.config import Config, MeshConfig
from eso_jax.errors import EsoError
from eso_jax.model import masks, transformer
from eso_jax.model.params import PARAMETERS, fold, init_params, param_shardings, param_spec
from eso_jax.run import train

SCRIPT = Path(mesh_losses.__file__)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Of 20 steps, by family and mesh. A process makes those of all families: to start one takes as long as a program.
    """
    folder, names = tmp_path_factory.mktemp("losses"), ",".join(families.BY_NAME)
    one = [sys.executable, str(SCRIPT), str(folder / "one.json"), names, "1", "8,1,1", "1,8,1", "2,1,4"]
    done = subprocess.run(one, capture_output=True, text=True, env=emulated(8))
    assert done.returncode == 0, done.stderr
    two = [sys.executable, str(SCRIPT), str(folder / "two.json"), names, "1,4,2"]
    outputs = together([two] * 2, devices=4, limit=900)
    assert "Involuntary" not in "".join([done.stderr, *outputs])  # XLA's word for gathering what should stay split
    found = [json.loads((folder / name).read_text()) for name in ("one.json", "two.json")]
    return {family: found[0][family] | found[1][family] for family in families.BY_NAME}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_losses_agree_on_every_mesh(family: str, losses: dict[str, dict[str, list[float]]]) -> None:
    """20 steps on one device, 8 along data, 8 along fsdp, 4 along tensor x 2 along data; and two processes of 4
    devices, whose parameters are split over both."""
    reference = np.array(losses[family]["1"])
    assert len(reference) == 20 and np.ptp(reference) > 0.2 and len(losses[family]) == 5
    for mesh, values in losses[family].items():
        np.testing.assert_allclose(values, reference, rtol=1e-5, err_msg=f"mesh {mesh}")


def test_every_parameter_has_a_rule_and_no_rule_is_dead() -> None:
    names = set()
    for config in (tiny_config("esolm"), tiny_config("ar").override("model.cond_dim=0")):
        state = jax.eval_shape(lambda config=config: train.init_state(config).__dict__)
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            param_spec(path, x.ndim)
        names |= set(state["params"])
    assert names == set(PARAMETERS)
    assert {axis for one in PARAMETERS.values() for axis in one.axes} == set(sharding.RULES) == set(sharding.SAMPLING)


@pytest.mark.parametrize("rules, message", [
    ({"vector": None}, "logical axis = 'vector': has no rule in eso_jax/sharding.py"),
    ({"vector": ("fsdp", "fsdp")}, "names an axis twice"),
    ({"layers": ("data", "fsdp"), "vector": "data"}, "names an axis twice"),
    ({"vector": "model"}, "may name only data, fsdp, tensor")])
def test_bad_rules_are_refused(rules: dict[str, sharding.Axes], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for axis, rule in rules.items():
        if rule is None:
            monkeypatch.delitem(sharding.RULES, axis)
        else:
            monkeypatch.setitem(sharding.RULES, axis, rule)
    with pytest.raises(EsoError, match=message):
        param_shardings({"norm1": jnp.zeros((2, 16))}, sharding.mesh(MeshConfig()))


@pytest.mark.parametrize("mesh, message", [
    ({"fsdp": 3}, "mesh.fsdp x mesh.tensor = 3: must divide the number of devices, 1"),
    ({"data": 2}, "mesh.data = 2: times fsdp = 1 and tensor = 1 must be the number of devices, 1; leave")])
def test_meshes_that_do_not_fit_the_devices(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(EsoError, match=message):
        sharding.mesh(MeshConfig(**mesh))


def test_slices_are_joined_along_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform = "tpu"

        def __init__(self, slice_index: int) -> None:
            self.slice_index = slice_index

    asked = []

    def grid(*arguments: Any, **options: Any) -> None:
        asked.append(arguments[:2])
        raise InterruptedError

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", grid)
    devices = [Device(n // 8) for n in range(16)]
    with pytest.raises(InterruptedError):
        sharding.mesh(MeshConfig(fsdp=2, tensor=2), devices)
    assert asked == [((2, 2, 2), (2, 1, 1))]
    with pytest.raises(EsoError, match="mesh.data = 1: must be a multiple of the 2 slices"):
        sharding.mesh(MeshConfig(fsdp=8, tensor=2), devices)


@pytest.mark.parametrize("overrides, shape, message", [
    (["train.batch_size=12"], (8, 1, 1),
     "train.batch_size = 12: must be a multiple of 8: mesh.data x mesh.fsdp = 8 .*; "
     r"change one of these \(a run that resumes keeps its batch size\), or use fewer devices"),
    (["train.accumulate=4"], (2, 4, 1), "train.batch_size = 16: must be a multiple of 32: .* in train.accumulate = 4"),
    (["family.name=esolm", "family.alpha_0=0.5", "train.batch_size=8"], (8, 1, 1),
     "train.batch_size = 8: must be a multiple of 16: .* by kappa = 1/2"),
    ([], (1, 1, 8), "mesh.tensor = 8: must divide the 4 heads"),
    (["model.width=24"], (1, 4, 4), "mesh.fsdp x mesh.tensor = 16: must divide model.width = 24")])
def test_models_that_do_not_fit_the_mesh(overrides: list[str], shape: tuple[int, ...], message: str) -> None:
    config = mesh_losses.config_of("mdlm").override(*overrides)
    with pytest.raises(EsoError, match=message):
        sharding.check(config, AbstractMesh(shape, sharding.AXES))


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_the_program_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch,
                                                   request: pytest.FixtureRequest) -> None:
    """Scanned, as on accelerators: 2, 8 and 32 layers are one program, in lines of HLO and in seconds to compile it."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    jax.config.update("jax_enable_compilation_cache", False)
    request.addfinalizer(lambda: jax.config.update("jax_enable_compilation_cache", True))
    lines, seconds = [], []
    for layers in (2, 8, 32):
        config = mesh_losses.config_of("ar").override(f"model.layers={layers}", "train.remat=full")
        lowered = train.lower_step(config, sharding.mesh(MeshConfig()))
        begin = time.perf_counter()
        compiled = lowered.compile(USUAL)
        seconds.append(time.perf_counter() - begin)
        lines.append((len(lowered.as_text().splitlines()), len(compiled.as_text().splitlines())))
    assert max(n for n, _ in lines) <= 1.02 * min(n for n, _ in lines), lines
    assert max(n for _, n in lines) <= 1.1 * min(n for _, n in lines), lines
    assert seconds[2] < 2 * min(seconds[:2]) + 1, seconds


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_step_and_saves_memory(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")  # scanned without it as well
    found = []
    for name in ("none", remat):
        config = mesh_losses.config_of("esolm").override("model.layers=8", "model.length=64", f"train.remat={name}")
        mesh = sharding.mesh(config.mesh)
        compiled = train.lower_step(config, mesh).compile(USUAL)
        tokens = sharding.put_rows(np.arange(16 * 64, dtype=np.int32).reshape(16, 64) % 32, mesh, 16)
        with jax.set_mesh(mesh):
            state = train.begin(config, mesh)
            for _ in range(3):
                state, values = compiled(state, tokens)
        found.append((float(values["loss"]), compiled.memory_analysis().temp_size_in_bytes))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] < 0.8 * found[0][1], found


@pytest.mark.slow
def test_head_is_split_by_vocabulary_and_logits_are_never_whole() -> None:
    """On 8 devices: compiled for tensor = 4, no array holds all 33 (padded: 36) logits of a row."""
    script = """
import re, jax, mesh_losses
from eso_jax import sharding
from eso_jax.config import MeshConfig
from eso_jax.run import train
config = mesh_losses.config_of("mdlm", MeshConfig(2, 1, 4))
text = train.lower_step(config, sharding.mesh(config.mesh)).compile().as_text()
shapes = set(re.findall(r"f32\\[(?:8,16|128),\\d+\\]", text))
assert any(s.endswith(",9]") for s in shapes), shapes
assert not any(s.endswith((",33]", ",36]")) for s in shapes), shapes
"""
    flags = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=emulated(8) | flags)
    assert done.returncode == 0, done.stderr


ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from conftest import random_params, tiny_config
from eso_jax import sharding
from eso_jax.engine.model import Model
from eso_jax.model.params import for_inference

config = tiny_config("esolm", 12, 9).override("model.layers=1")
given = np.full((5, 12), 8)  # five rows, which divide over no mesh; the mask is 8
given[1, 3:6], given[2, :4] = 5, 2
for decoder in ("speculative:3", "speculative", "entropy:2", "likeliest:3"):
    found = []
    for devices, tensor in ((1, 1), (4, 2)):
        mesh = sharding.inference_mesh(config.model, tensor, jax.devices()[:devices])
        weights = for_inference(config.model, random_params(config.model), jnp.float32, mesh)
        samples = Model(config, weights, mesh, 3, step=0, tokenizer=None).sample(1, given=given, decoder=decoder)
        found.append([samples.tokens, samples.order, samples.passes])
    for one, four in zip(*found, strict=True):
        np.testing.assert_array_equal(four, one, err_msg=decoder)
    assert found[0][2].max() < 12 and len(set(found[0][2])) > 1, found[0][2]  # each row has widths of its own
"""


@pytest.mark.slow
def test_decoders_that_decide_as_they_go_draw_the_same_on_a_mesh() -> None:
    """On one device, and on two pairs: a pair shares the weights, and both share the rows."""
    path = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], capture_output=True, text=True, env=emulated(4) | path)
    assert done.returncode == 0, done.stderr


def test_rows_of_one_process_are_all() -> None:
    mesh = sharding.mesh(MeshConfig())
    assert sharding.rows_of_process(mesh, 6).tolist() == list(range(6))
    tokens = np.arange(12, dtype=np.int32).reshape(6, 2)
    np.testing.assert_array_equal(sharding.put_rows(tokens, mesh, 6), tokens)


def test_deep_models_are_not_unrolled_whole_on_cpu() -> None:
    def lines(layers: int) -> int:
        model = Config().override(f"model.layers={layers}", "model.width=16", "model.heads=2").model
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

        def hidden(params: dict, tokens: jax.Array) -> jax.Array:
            weights = fold(model, params)
            return transformer.trunk(weights, tokens, transformer.natural_positions(tokens),
                                     masks.View(masks.CAUSAL))[0]

        return len(jax.jit(hidden).lower(params, jax.ShapeDtypeStruct((2, 8), jnp.int32)).as_text().splitlines())

    assert lines(48) <= 1.25 * lines(12) and lines(12) > 1.5 * lines(2)
