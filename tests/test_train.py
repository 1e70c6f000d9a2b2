"""Training: it learns, it resumes to the bit, and it stops cleanly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eso_jax
from conftest import BASE, as_family, emulated, params_of, random_tokens, together
from eso_jax import families, flops, sharding
from eso_jax.config import Config
from eso_jax.data import windows_of
from eso_jax.data.pipeline import batches
from eso_jax.errors import EsoError
from eso_jax.model.params import PARAMETERS
from eso_jax.run import metrics, train as training
from eso_jax.run.optim import optimizer, update_ema
from eso_jax.run.timing import in_words


def step_lines(workdir: Path) -> list[dict[str, float]]:
    lines = [line for line in metrics.read(workdir) if "loss" in line]
    speeds = ("tokens_per_second", "tflops_per_second")
    return [{name: value for name, value in line.items() if name not in speeds} for line in lines]


def test_the_share_of_short_steps_and_their_lengths() -> None:
    config = BASE.override("train.random_length=0.25")
    lengths = np.array([training.length_of_step(config, step) for step in range(4000)])
    assert set(lengths) == set(range(2, 17, 2))
    counts = np.bincount(lengths // 2)[1:] / 4000
    np.testing.assert_allclose(counts, [1 / 32] * 7 + [0.75 + 1 / 32], atol=0.03)
    assert (lengths == [training.length_of_step(config, step) for step in range(4000)]).all()
    other = config.override("train.seed=5")
    assert (lengths != [training.length_of_step(other, step) for step in range(4000)]).any()
    for override, expected in (("train.random_length=0", {16}), ("model.length=4", {1, 2, 3, 4})):
        assert {training.length_of_step(config.override(override), step) for step in range(200)} == expected
    blocks = BASE.override("train.random_length=1", "family.name=bd3lm", "family.block_size=8")
    assert {training.length_of_step(blocks, step) for step in range(50)} == {8, 16}
    with pytest.raises(EsoError, match="train.random_length = 1.5: must be in"):
        BASE.override("train.random_length=1.5")


@pytest.mark.slow
def test_a_short_step_has_the_loss_of_the_short_rows_alone(base: Config, tmp_path: Path) -> None:
    """By a model of their length that never saw the rest; and the run goes on."""
    run = base.override("train.random_length=1", "train.steps=2")
    run = next(other for seed in range(99) if training.length_of_step(
        other := run.override(f"train.seed={seed}"), 1) == 8)
    training.train(run, tmp_path / "w")
    rows = next(batches(windows_of(run, "train"), 8, run.data.seed))[:, :8]
    short, mesh = run.override("model.length=8"), sharding.mesh(run.mesh)
    with jax.set_mesh(mesh):
        _, values = training.jit_step(short, mesh)(training.begin(short, mesh), sharding.put_rows(rows, mesh, 8))
    assert step_lines(tmp_path / "w")[0]["loss"] == float(values["loss"])
    assert step_lines(tmp_path / "w")[1]["step"] == 2


@pytest.mark.slow
def test_it_learns_logs_and_draws(base: Config, tmp_path: Path) -> None:
    run = base.override("train.steps=60", "train.eval_every=30", "train.log_every=10")
    training.train(run, tmp_path / "w", {"a baseline": 3.0})
    lines = metrics.read(tmp_path / "w")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert {"loss", "diffusion", "sequential", "gradient_norm", "update_norm", "parameter_norm", "tokens_per_second",
            "tflops_per_second", "step"} == set(lines[0])
    per_token = lines[1]["tflops_per_second"] * 1e12 / lines[1]["tokens_per_second"]
    assert per_token == pytest.approx(sum(flops.training_step(run).values()) / (8 * 16))
    found = [line for line in lines if "validation_bits_per_byte" in line]
    assert [line["step"] for line in found] == [30, 60]
    assert found[1]["validation_nats_per_token"] < found[0]["validation_nats_per_token"]
    assert found[0]["validation_standard_error"] > 0 and found[0]["validation_perplexity"] > 1
    assert (tmp_path / "w" / "loss.png").stat().st_size > 5000
    assert eso_jax.load(tmp_path / "w").step == 60


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_every_family_trains(family: str, base: Config, tmp_path: Path) -> None:
    run = base.override(*as_family(family), "train.steps=2")
    state = training.train(run, tmp_path / "w")
    assert int(state.step) == 2 and np.isfinite(optax.tree.norm(state.params))


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(base: Config, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """8 steps equal 3 + 5: parameters, averages, optimizer, data and logged losses."""
    whole = training.train(base, tmp_path / "whole")
    training.train(base.override("train.steps=3"), tmp_path / "parts")
    capsys.readouterr()
    resumed = training.train(base, tmp_path / "parts")
    assert "step 3 of 8" in capsys.readouterr().err  # it did not start over
    chex.assert_trees_all_equal(whole, resumed)
    assert step_lines(tmp_path / "whole") == step_lines(tmp_path / "parts")


@pytest.mark.slow
def test_kill_9_and_rerun(base: Config, tmp_path: Path) -> None:
    """Killed once a checkpoint is whole, the same command goes on from there to the same end."""
    (tmp_path / "run.json").write_text(base.to_json())
    command = [sys.executable, "-m", "eso_jax", "train", str(tmp_path / "run.json"), "--workdir", str(tmp_path / "w")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "w" / "checkpoints" / "3").is_dir():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    rerun = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "step 3 of 8" in rerun.stderr or "step 6 of 8" in rerun.stderr  # it did not start over
    whole = training.train(base, tmp_path / "whole")
    np.testing.assert_equal(step_lines(tmp_path / "w"), step_lines(tmp_path / "whole"))
    chex.assert_trees_all_equal(params_of(tmp_path / "w"), jax.device_get(whole.ema))


def test_a_torn_metrics_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = metrics.MetricsLog(tmp_path, 5)
    log.write(3, loss=1.0)
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 3]


@pytest.mark.slow
def test_accumulation_changes_nothing() -> None:
    """One batch of 8 and four micro-batches of 2 take the same step."""
    one, four = (BASE.override(f"train.accumulate={count}", "model.dropout=0.1") for count in (1, 4))
    tokens = random_tokens(one, 8)
    states = [jax.jit(training.train_step, static_argnums=0)(run, training.init_state(run), tokens)
              for run in (one, four)]
    chex.assert_trees_all_close(*[values for _, values in states], rtol=1e-5)
    for run, (state, _) in zip((one, four), states, strict=True):
        states = [jax.jit(training.train_step, static_argnums=0)(run, state, tokens)[1] for run in (one, four)]
        chex.assert_trees_all_close(*states, rtol=1e-5)


@pytest.mark.slow
def test_non_finite_step_stops_and_names_the_last_checkpoint(base: Config, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    what, bad = "finite", False
    real = training.train_step

    def poisoned(config: Config, state: training.TrainState, tokens: jax.Array) -> tuple:
        state, values = real(config, state, tokens)
        return state, values | {what: jnp.where(state.step == 6, bad, values[what])}

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(EsoError, match=r"at step 6: .*train.seed = 1, data.seed = 0.*checkpoint is step 3;"):
        training.train(base, tmp_path / "w")
    monkeypatch.undo()
    assert eso_jax.load(tmp_path / "w").step == 3
    assert int(training.train(base, tmp_path / "w").step) == 8


def test_out_of_memory_says_what_to_change(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nBFC allocator: ...")

    monkeypatch.setattr(training, "jit_step", lambda *arguments: full)
    with pytest.raises(EsoError, match=r"train.batch_size = 8: not enough memory on a device \(Out of memory "
                                       r"allocating 99 bytes.\); raise train.accumulate"):
        training.train(base, tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("override", ["train.learning_rate=1e38", "train.learning_rate=1e30"])
def test_an_exploding_run_is_not_saved(override: str, base: Config, tmp_path: Path) -> None:
    """The update is looked at, not only the loss before it."""
    with pytest.raises(EsoError, match="is not finite"):
        training.train(base.override(override, "train.warmup=0", "train.save_every=1"), tmp_path / "w")
    for path in (tmp_path / "w" / "checkpoints").iterdir():
        assert path.name.isdigit()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params_of(tmp_path / "w", ema=False)))


@pytest.mark.slow
def test_a_work_directory_beyond_the_asked_steps_is_left_alone(base: Config, tmp_path: Path) -> None:
    training.train(base.override("train.steps=2"), tmp_path / "w")
    before = (tmp_path / "w" / "config.json").read_text()
    with pytest.raises(EsoError, match="train.steps = 1: .* is at step 2 already"):
        training.train(base.override("train.steps=1"), tmp_path / "w")
    assert (tmp_path / "w" / "config.json").read_text() == before


@pytest.mark.slow
def test_a_work_directory_is_of_one_run(base: Config, tmp_path: Path) -> None:
    training.train(base.override("train.steps=1"), tmp_path / "w")
    before = (tmp_path / "w" / "config.json").read_text()
    with pytest.raises(EsoError, match=r"model.width = 32: --workdir .* holds a run with 16"):
        training.train(base.override("model.width=32"), tmp_path / "w")
    assert (tmp_path / "w" / "config.json").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(EsoError, match="is not a run's"):
        training.train(base, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """BASE on a corpus of 300 validation windows and more, in steps for many devices."""
    path = tmp_path_factory.mktemp("long") / "text.py"
    path.write_text("".join(f"print({n} ** 2)\n" for n in range(8000)))
    return BASE.override(f"data.source={path}", "model.layers=1", "train.steps=4", "train.batch_size=16",
                         "train.eval_windows=300")


@pytest.mark.slow
def test_eight_devices_take_the_same_steps(long: Config, tmp_path: Path) -> None:
    """Neither losses nor validation depend on the number of devices (here eight emulated ones), though they do not
    divide the number of windows, nor on the number of processes."""
    (tmp_path / "run.json").write_text(long.override("train.eval_windows=100").to_json())
    command = [sys.executable, "-m", "eso_jax", "train", str(tmp_path / "run.json"), "--workdir"]
    done = subprocess.run([*command, str(tmp_path / "eight")], capture_output=True, text=True, env=emulated(8))
    assert done.returncode == 0, done.stderr
    together([[*command, str(tmp_path / "two"), "--multi-host", "mesh.fsdp=2"]] * 2, devices=4)
    training.train(long.override("train.eval_windows=100"), tmp_path / "one")
    steps, (right,) = step_lines(tmp_path / "one"), validation_lines(tmp_path / "one")
    assert right["validation_windows"] == 100
    for name in ("eight", "two"):
        losses = [[line["loss"] for line in lines] for lines in (step_lines(tmp_path / name), steps)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        (ours,) = validation_lines(tmp_path / name)
        assert ours.pop("validation_bytes_of") == right["validation_bytes_of"]
        assert ours.pop("validation_terms") == pytest.approx(right["validation_terms"], rel=1e-5)
        assert ours == pytest.approx({key: right[key] for key in ours}, rel=1e-5)


def validation_lines(workdir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics.read(workdir) if "validation_windows" in line]


@pytest.mark.slow
@pytest.mark.parametrize("family, windows", list(zip(families.BY_NAME, itertools.cycle((100, 300)))))
def test_a_pod_passes_its_evaluation(family: str, windows: int, long: Config, tmp_path: Path) -> None:
    """128 devices, which do not divide the windows."""
    run = long.override(*as_family(family), "train.steps=2", "train.batch_size=256", f"train.eval_windows={windows}")
    (tmp_path / "run.json").write_text(run.to_json())
    done = subprocess.run([sys.executable, "-m", "eso_jax", "train", str(tmp_path / "run.json"), "--workdir",
                           str(tmp_path / "w"), "mesh.fsdp=4"], capture_output=True, text=True, env=emulated(128))
    assert done.returncode == 0, done.stderr
    assert "128 cpu device(s) (data 32 x fsdp 4)" in done.stderr
    (line,) = validation_lines(tmp_path / "w")
    assert line["step"] == 2 and line["validation_windows"] == windows and np.isfinite(line["validation_bits_per_byte"])


def test_ema_ramp() -> None:
    zeros, ones = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    for updates, decay in ((1, 2 / 11), (90, 0.91), (10**7, 0.9999)):
        np.testing.assert_allclose(update_ema(zeros, ones, jnp.int32(updates), 0.9999)["w"], 1 - decay, rtol=1e-3)


@pytest.mark.parametrize("schedule, warmup, expected", [
    ("constant", 4, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]), ("linear", 4, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ("cosine", 4, [0, 0.25, 0.5, 0.75, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ("linear", 0, np.linspace(1, 0, 9)[:8]), ("constant", 0, np.ones(8))])
def test_rates(schedule: str, warmup: int, expected: list[float]) -> None:
    """Adam's step with a constant gradient is its rate, which is 0 from train.steps on."""
    ones = {"w": jnp.ones(2)}
    tx = optimizer(BASE.override(f"train.schedule={schedule}", f"train.warmup={warmup}", "train.learning_rate=1").train)
    state, rates = tx.init(ones), []
    for _ in range(9):
        updates, state = tx.update(ones, state, ones)
        rates.append(-float(updates["w"][0]))
    np.testing.assert_allclose(rates, [*expected, schedule == "constant"], atol=1e-5)


def test_weight_decay_is_not_of_norms_and_biases() -> None:
    """And it is optax's; the state has its form with and without it, so that a checkpoint of before is read."""
    config = BASE.override("train.weight_decay=0.1", "train.warmup=0", "train.learning_rate=1").train
    params = {name: jnp.full(2, 0.5) for name in PARAMETERS}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = optimizer(config).update(still, optimizer(config).init(params), params)
    assert optimizer(dataclasses.replace(config, weight_decay=0.0)).update(still, state, params)[0]["qkv"].max() == 0
    kept = {name for name, update in updates.items() if not update.any()}
    assert kept == {name for name in params if not PARAMETERS[name].inputs} - {"embedding"}
    for name in params.keys() - kept:
        np.testing.assert_allclose(updates[name], -0.1 * params[name], rtol=1e-6)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=0.1))
    assert jax.tree.structure(theirs.init(params)) == jax.tree.structure(state)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    tx = optimizer(BASE.override("train.clip_norm=0.5", "train.beta1=0", "train.beta2=0", "train.eps=1").train)
    params = {"w": jnp.zeros(1)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    _, state = tx.update(params, state, params)  # past the two warm-up steps
    updates, _ = tx.update({"w": jnp.full(1, 100.0)}, state, params)
    assert float(updates["w"][0]) == pytest.approx(-0.01 * 0.5 / 1.5, rel=1e-4)


@pytest.mark.slow
def test_steps_are_traced(base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.train(base.override("train.profile_steps=2"), tmp_path / "w")
    assert "traced 2 steps into" in capsys.readouterr().err
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    training.train(base.override("train.profile_steps=100", "train.steps=9"), tmp_path / "w")  # too few are left: none


def test_utilization_is_of_the_chips_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(metrics.speed(10.0, 2e12)) == {"tokens_per_second", "tflops_per_second"}  # of a CPU there is no peak

    class V5e:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda: [V5e()] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.speed(10.0, 394e12)["mfu"] == pytest.approx(0.5)


def test_config_is_kept_as_text(base: Config, tmp_path: Path) -> None:
    training.train(base.override("train.steps=1"), tmp_path / "w")
    assert json.loads((tmp_path / "w" / "config.json").read_text())["model"]["width"] == 16


@pytest.mark.parametrize("first, told", [(1, "about 13 minutes for the 89 steps"), (61, "about 6 minutes for the 29")])
def test_it_says_how_long_it_will_take(first: int, told: str, base: Config, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, by its first steps but the one that compiles; of a resumed run what is left. Evaluations count, and the
    compilation of one: a third of the step's."""
    run = base.override("train.steps=100", "train.log_every=20", "train.eval_every=50", "train.save_every=50")
    now = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    meter = training._Meter(run, metrics.MetricsLog(tmp_path, first - 1), lambda: "", windows=160)
    for step in range(first, 101):
        meter.add(step, {"loss": jnp.float32(1.0), "finite": jnp.bool_(True)}, 1.0, step == first)
        now += 406.0 if step == first else 6.0  # 89 + 20 and 29 + 10 steps of work
    meter.flush()
    lines = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert len(lines) == 1 and lines[0].startswith(told)
    assert lines[0].endswith("and their evaluations, by the first few")


@pytest.mark.parametrize("compiled, told", [(8, "about 80 minutes for the 981"), (4, "about 1.6 hours for the 989")])
def test_of_random_lengths_it_knows_the_mean_and_what_is_not_compiled(
        compiled: int, told: str, base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """4.5 seconds each on average, by steps whose compilation is not counted; 300 for each program, and a third."""
    run = base.override("train.steps=1000", "train.eval_every=1000", "train.log_every=20", "train.save_every=1000",
                        "train.random_length=1")
    now = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    meter = training._Meter(run, metrics.MetricsLog(tmp_path, 0), lambda: "", windows=0)
    for step in range(1, 41):
        length = 9 - compiled + step % compiled
        if step <= compiled:
            meter.flush()
        now += length + (300 if step <= compiled else 0)
        meter.add(step, {"loss": jnp.float32(1.0), "finite": jnp.bool_(True)}, length / 8, step <= compiled)
    meter.flush()
    [line] = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert line.startswith(told)
    speeds = [line["tokens_per_second"] for line in metrics.read(tmp_path)]
    assert len(speeds) == 2 and max(speeds) < 1.2 * min(speeds)


@pytest.mark.parametrize("seconds, words", [(0.2, "2 seconds"), (89.0, "89 seconds"), (419.0, "7 minutes"),
                                            (9000.0, "2.5 hours"), (300_000.0, "3.5 days"), (1e6, "12 days")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
