"""What goes wrong on real machines: processes die, disks fill, files rot, hosts do not come, steps hang.

    pytest tests/test_faults.py --kills 20     the long form: that many kills in a row
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import eso_jax
from conftest import BASE, as_family, emulated, free_port, launch, params_of, together
from eso_jax import files
from eso_jax.config import Config
from eso_jax.data import windows_of
from eso_jax.data.pipeline import batches
from eso_jax.errors import EsoError, RunAgain
from eso_jax.families import Family
from eso_jax.model.params import Weights
from eso_jax.noise import Draws
from eso_jax.run import checkpoint, metrics, multihost, stopping, train as training
from test_train import step_lines

pytestmark = pytest.mark.slow

TRAIN = [sys.executable, "-m", "eso_jax", "train"]


@pytest.fixture(scope="module")
def base(base: Config) -> Config:
    """Of a family that draws at every step, and whose programs are compiled in half the time: each process does it."""
    return base.override(*as_family("mdlm"))


def start(run: Path, workdir: Path, processes: int = 1, *overrides: str) -> list[subprocess.Popen]:
    """The processes of a run, one emulated device each (two in all, so that one process alone has them as well)."""
    command = [*TRAIN, str(run), "--workdir", str(workdir), *overrides]
    if processes == 1:
        return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=emulated(2))]
    return launch([[*command, "--multi-host"]] * processes)


def finish(processes: list[subprocess.Popen], limit: float = 120) -> list[str]:
    """What they wrote on stderr, once they have ended."""
    try:
        return [process.communicate(timeout=limit)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics.read(workdir)):
        alive = all(process.poll() is None for process in processes)
        assert alive and time.monotonic() < deadline, finish(processes, 1)
        time.sleep(0.01)


def test_kill_9_at_random_moments(base: Config, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two processes; one of them, or both, are killed at random moments, again and again. The other one ends by itself,
    each start goes on from the newest checkpoint, and what comes out is the uninterrupted run, bit for bit."""
    kills, dice = request.config.getoption("--kills"), random.Random(0)
    interval = 20
    run, workdir = tmp_path / "run.json", tmp_path / "w"
    endless = base.override("train.steps=1000000", f"train.save_every={interval}", "train.eval_every=1000000")
    run.write_text(endless.to_json())
    reached = 0
    for kill in range(kills):
        processes = start(run, workdir, 2)
        if dice.random() < 0.8:
            wait_for_step(workdir, reached + 1, processes)
            time.sleep(dice.uniform(0, 1))
            victims = dice.choice([[0], [1], [0, 1]])
        else:  # somewhere in its start, where a process would wait ten minutes for the other
            time.sleep(dice.uniform(0, 8))
            victims = [0, 1]
        for victim in victims:
            os.kill(processes[victim].pid, signal.SIGKILL)
        outputs = finish(processes)
        for index in {0, 1} - set(victims):  # 75 by itself, or JAX's abort where it noticed first
            assert processes[index].returncode in (RunAgain.EXIT, -signal.SIGABRT), outputs[index]
        resumed = [int(n) for n in re.findall(r"step (\d+) of", outputs[0])[:1]]
        if resumed:
            assert resumed[0] >= reached - 2 * interval, f"kill {kill}: from {resumed[0]}, had been at {reached}"
        reached = max([reached, *(line["step"] for line in metrics.read(workdir))])
        assert max([0, *checkpoint.steps(workdir)]) >= reached - 2 * interval
    last = max([0, *checkpoint.steps(workdir)])
    steps = last + 15
    end = f"train.steps={steps}"
    processes = start(run, workdir, 2, end)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"step {last} of {steps}" in outputs[0]
    whole = start(run, tmp_path / "whole", 2, end)
    outputs = finish(whole, 300)
    assert [process.returncode for process in whole] == [0, 0], outputs
    assert step_lines(workdir) == step_lines(tmp_path / "whole")
    assert [line["step"] for line in step_lines(workdir)] == list(range(1, steps + 1))
    chex.assert_trees_all_equal(params_of(workdir), params_of(tmp_path / "whole"))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_asks_to_be_run_again(processes: int, base: Config, tmp_path: Path) -> None:
    """Only one of two processes gets the signal; both save, at the same step, and exit with 75."""
    run, workdir = tmp_path / "run.json", tmp_path / "w"
    run.write_text(base.override(*(f"train.{n}=1000000" for n in ("steps", "save_every", "eval_every"))).to_json())
    running = start(run, workdir, processes)
    wait_for_step(workdir, 3, running)
    running[-1].terminate()
    outputs = finish(running)
    assert [process.returncode for process in running] == [RunAgain.EXIT] * processes, outputs
    (step,) = checkpoint.steps(workdir)
    assert f"asked to stop (SIGTERM), saved step {step} of 1000000" in outputs[0]
    assert max(line["step"] for line in metrics.read(workdir)) == step
    end = f"train.steps={step + 5}"
    again = start(run, workdir, processes, end)
    outputs = finish(again)
    assert again[0].returncode == 0 and f"step {step} of {step + 5}" in outputs[0], outputs
    whole = start(run, tmp_path / "whole", processes, end)
    finish(whole)
    assert step_lines(workdir) == step_lines(tmp_path / "whole")


@pytest.fixture(scope="module")
def nine_steps(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the checkpoints of steps 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp("nine") / "w"
    training.train(base.override("train.steps=9"), workdir)
    assert checkpoint.steps(workdir) == [3, 6, 9]
    return workdir


def damage(path: Path, how: str, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:dice.randrange(len(content))])
    elif how == "flipped":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    else:
        path.unlink()


# What Orbax had begun in its own threads when a read failed is left, and may complain after the read is over.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over(how: str, nine_steps: Path, base: Config, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever of its files is damaged: the run goes on from there or from the one before, always with the values that
    were saved, and says so."""
    dice = random.Random(how)
    files = sorted(path.relative_to(nine_steps) for path in (nine_steps / "checkpoints" / "9").rglob("*")
                   if path.is_file() and path.stat().st_size)
    largest = sorted(files, key=lambda path: (nine_steps / path).stat().st_size)[-3:]  # the values are in there
    whole = {step: step_lines(nine_steps)[step - 1] for step in range(1, 10)}
    passed_over = 0
    for number, path in enumerate(dice.sample(files, 2) + largest):
        workdir = tmp_path / f"{number}"
        shutil.copytree(nine_steps, workdir)
        damage(workdir / path, how, dice)
        capsys.readouterr()
        training.train(base.override("train.steps=10"), workdir)
        said = capsys.readouterr().err
        if "step 9 of 10, in" not in said:
            passed_over += 1
            assert "step 6 of 10, in" in said and "warning: checkpoint 9 in" in said, (path, said)
            assert (workdir / "checkpoints" / "damaged-9").is_dir()
        assert {line["step"]: line for line in step_lines(workdir) if line["step"] < 10} == whole, path
        assert checkpoint.steps(workdir)[-1] == 10
    assert passed_over >= 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError(
    "UNKNOWN: Error reading \"x/d/0\" [OS error 116: Stale file handle]"), TimeoutError("timed out"), MemoryError()])
def test_storage_that_does_not_answer_is_asked_again_and_breaks_nothing(
        error: Exception, nine_steps: Path, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """A read that fails once or twice is of no consequence; one that always fails ends the run, and renames nothing."""
    monkeypatch.setattr(files, "PAUSE", 0.0)
    shutil.copytree(nine_steps, tmp_path / "w")
    real, failures = ocp.training.Checkpointer.load_checkpointables, [2]

    def failing(*arguments: object, **options: object) -> object:
        failures[0] -= 1
        if failures[0] >= 0:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", failing)
    assert eso_jax.load(tmp_path / "w").step == 9
    assert capsys.readouterr().err.count("checkpoint 9 in") == 2
    failures[0] = 1000
    with pytest.raises(RunAgain, match="checkpoint 9 could not be read 3 times .*; nothing says that it is damaged"):
        training.train(base.override("train.steps=10"), tmp_path / "w")
    assert failures[0] == 1000 - 3 and checkpoint.steps(tmp_path / "w") == [3, 6, 9]
    assert not list((tmp_path / "w" / "checkpoints").glob("damaged*"))


def test_any_flipped_bit_of_the_values_is_seen(nine_steps: Path) -> None:
    dice = random.Random(0)
    params = jax.device_get(params_of(nine_steps))
    right = checkpoint.fingerprint(params)
    for _ in range(50):
        name = dice.choice(sorted(params))
        wrong = {**params, name: params[name].copy()}
        bits = wrong[name].reshape(-1).view(np.uint32)
        bits[dice.randrange(len(bits))] ^= np.uint32(1 << dice.randrange(32))
        assert checkpoint.fingerprint(wrong) != right
    assert int(jax.jit(checkpoint._weighted_sum)(params)) == right  # as where it is compiled
    for swapped in ({**params, "qkv": params["qkv"][..., ::-1]},
                    {**params, "sigma_in_bias": params["sigma_out_bias"], "sigma_out_bias": params["sigma_in_bias"]}):
        assert checkpoint.fingerprint(swapped) != right


def test_values_that_changed_unseen_by_the_storage_are_caught(nine_steps: Path, base: Config, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(nine_steps, workdir)
    real = checkpoint.fingerprint
    lies = iter([1])
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: real(tree) + next(lies, 0))
    assert eso_jax.load(workdir).step == 6  # for reading too, and then nothing is touched
    assert "ema: not what was saved" in capsys.readouterr().err
    assert checkpoint.steps(workdir) == [3, 6, 9]


def test_no_whole_checkpoint_is_an_error_and_no_new_start(nine_steps: Path, base: Config, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(nine_steps, workdir)
    for step in (3, 6, 9):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "ema")
    with pytest.raises(EsoError, match=r"none of its checkpoints \(3, 6, 9\) is whole"):
        training.train(base.override("train.steps=10"), workdir)
    assert checkpoint.steps(workdir) == [3, 6, 9]


DISK_FULL = """
set -e
mount -t tmpfs -o size=$SIZE tmpfs $DISK
set +e
"$@" --workdir $DISK/w 2> $DISK.first
echo $? > $DISK.code
set -e
mount -o remount,size=256m $DISK
"$@" --workdir $DISK/w 2> $DISK.second
cp $DISK/w/metrics.jsonl $DISK.jsonl
"""


def test_a_full_disk_stops_cleanly_and_loses_nothing(base: Config, tmp_path: Path) -> None:
    """On a small tmpfs where all checkpoints are kept; with more room the same command goes on."""
    run, disk = tmp_path / "run.json", tmp_path / "disk"
    disk.mkdir()
    run.write_text(base.override("train.steps=30", "train.keep_every=3", "train.eval_every=1000").to_json())
    inside = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    done = subprocess.run([*inside, "bash", "-c", DISK_FULL, "bash", *TRAIN, str(run)], capture_output=True, text=True,
                          env={**os.environ, "DISK": str(disk), "SIZE": "2m"})
    first = (tmp_path / "disk.first").read_text()
    assert done.returncode == 0, done.stderr + first
    assert (tmp_path / "disk.code").read_text() == "2\n"
    found = re.search(r"the checkpoint of step (\d+) could not be written \(the disk is full\); the last good "
                      r"checkpoint is step (\d+); make room and repeat the command", first)
    assert found and int(found[1]) - int(found[2]) == 3 and "Traceback" not in first, first
    assert f"step {found[2]} of 30" in (tmp_path / "disk.second").read_text()
    training.train(base.override("train.steps=30", "train.eval_every=1000"), tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "disk.jsonl").read_text().splitlines()]
    found_losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert found_losses == {line["step"]: line["loss"] for line in step_lines(tmp_path / "whole")}


def test_what_a_failed_save_leaves_behind_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each file it was still writing there would be a traceback. Others are shown, and all are afterwards."""
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))

    class Left:
        def __init__(self, said: str) -> None:
            self.said = said

        def __del__(self) -> None:
            raise RuntimeError(self.said)

    with checkpoint.open_checkpoints(tmp_path, keep=1):
        Left("Event loop is closed")
        Left("else")
    Left("Event loop is closed")
    assert shown == ["else", "Event loop is closed"]


WAITING = """
import sys, time
from pathlib import Path
from eso_jax.errors import RunAgain
from eso_jax.run import multihost
multihost.start(Path(sys.argv[1]), 60)
if multihost.is_writer():
    try:
        multihost.barrier("data", 2)
    except RunAgain as error:
        multihost.leave(error)
time.sleep(60)
"""


def test_a_barrier_names_the_host_that_does_not_come(tmp_path: Path) -> None:
    waits, sleeps = launch([[sys.executable, "-c", WAITING, str(tmp_path / "roll")]] * 2)
    said = waits.communicate(timeout=90)[1]
    sleeps.kill()
    sleeps.communicate()
    assert waits.returncode == RunAgain.EXIT, said
    assert re.search(rf"waited 2 s at 'data' for process 1 on {re.escape(os.uname().nodename)}", said), said


ALONE = """
import pathlib, sys
from eso_jax.run import multihost
multihost.PATIENCE = 1
multihost.start(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
"""


def start_alone(workdir: Path, wait: int) -> subprocess.Popen:
    """Process 0 of two, the other of which does not come."""
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2",
           "JAX_PROCESS_ID": "0", "TPU_WORKER_HOSTNAMES": "here,there"}
    return subprocess.Popen([sys.executable, "-c", ALONE, str(workdir / "hosts.partial"), str(wait)], text=True,
                            stderr=subprocess.PIPE, env=env)


def test_a_process_that_is_never_started_is_named(base: Config, tmp_path: Path) -> None:
    waits = start_alone(tmp_path / "w", 4)
    said = finish([waits])[0]
    assert waits.returncode == RunAgain.EXIT, said
    assert "waiting for the other processes; missing: process 1 on there; came: 0 on " in said
    assert "waited 4 s for the other processes to start; missing: process 1 on there; came: 0 on " in said
    training.train(base.override("train.steps=1"), tmp_path / "w")  # what it left is in nobody's way


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile hear SIGINT, also where the tests run in the background of a shell and do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
    waits = start_alone(tmp_path / "w", 600)
    assert waits.stderr is not None and "waiting for the other processes" in waits.stderr.readline()
    waits.send_signal(signal.SIGINT)
    assert "interrupted" in finish([waits], 20)[0] and waits.returncode == 130
    assert not list((tmp_path / "w" / "hosts.partial").iterdir())


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_lost_process_is_named(base: Config, tmp_path: Path) -> None:
    """After Ctrl-C in one of two, in the middle of the run."""
    run, workdir = tmp_path / "run.json", tmp_path / "w"
    run.write_text(base.override("train.steps=1000000", "train.eval_every=1000000").to_json())
    running = start(run, workdir, 2)
    wait_for_step(workdir, 5, running)
    running[1].send_signal(signal.SIGINT)
    outputs = finish(running)
    assert [process.returncode for process in running] == [RunAgain.EXIT, 130], outputs
    assert "interrupted" in outputs[1]
    host, last = re.escape(os.uname().nodename), checkpoint.steps(workdir)[-1]
    said = rf"lost another process of the run \(.*\); no sign of process 1 on {host}; the last good .* is step {last}$"
    assert re.search(said, outputs[0], re.M), outputs[0]


def test_one_of_several_processes_is_no_run_of_its_own(base: Config, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            with pytest.raises(EsoError, match=f"{name} = '2': this process is one of several; give --multi-host"):
                training.train(base, tmp_path / "w")
            patch.setenv(name, "1")
            multihost.check_alone()
    with monkeypatch.context() as patch, pytest.raises(EsoError, match="processes = 4: this is one of several of a"):
        patch.setattr(jax, "process_count", lambda: 4)
        training.train(base, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("other, message", [
    ({"train.learning_rate": 0.5}, "train.learning_rate = 0.5: in process 1, but 0.01 in process 0; all processes of"),
    ({"family.name": "ar", "train.seed": 2}, "family.name = 'ar': in process 1, but 'mdlm' in process 0"),
    ({"number of devices": 3}, "number of devices = 3: in process 1, but 1 in process 0; all processes of a run need")])
def test_processes_that_differ_do_not_begin(other: dict[str, Any], message: str, base: Config, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """With another config, each would train another model without a word; their data may be at other places."""
    def gather(name: str, text: str) -> list[str]:
        own = json.loads(text)
        assert other.keys() <= own.keys() and not {"data.source", "data.tokenizer"} & own.keys()
        return [text, json.dumps(own | other)]

    monkeypatch.setattr(multihost, "gather", gather)
    with pytest.raises(EsoError, match=message):
        training.train(base, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_two_runs_do_not_share_a_work_directory(base: Config, tmp_path: Path) -> None:
    run, workdir = tmp_path / "run.json", tmp_path / "w"
    run.write_text(base.override("train.steps=1000000", "train.eval_every=1000000").to_json())
    running = start(run, workdir)
    wait_for_step(workdir, 3, running)
    with pytest.raises(RunAgain, match="another run is training there; stop it, or give another one"):
        training.train(base, workdir)
    assert running[0].poll() is None
    os.kill(running[0].pid, signal.SIGKILL)
    finish(running)
    step = max([0, *checkpoint.steps(workdir)])  # a killed run holds nothing
    assert int(training.train(base.override(f"train.steps={step + 1}"), workdir).step) == step + 1


def test_checkpoints_that_are_gone_are_missed(base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = base.override("train.steps=4")
    training.train(short, tmp_path / "w")
    assert "parameters on 1 cpu device(s), step 0 of 4, in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    training.train(short, tmp_path / "w")
    assert "has no checkpoint, though its metrics go to step 4: from step 0 again" in capsys.readouterr().err


@pytest.mark.parametrize("environment, message", [
    ({}, "--multi-host: this process could not join the others"),
    ({"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "(HOST:PORT)"),
    ({"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID = 'first': must be a number")])
def test_multi_host_without_others_is_an_error(environment: dict[str, str], message: str, tmp_path: Path,
                                               base: Config) -> None:
    (tmp_path / "run.json").write_text(base.to_json())
    done = subprocess.run([*TRAIN, str(tmp_path / "run.json"), "--workdir", str(tmp_path / "w"), "--multi-host"],
                          capture_output=True, text=True, env={**os.environ, **environment}, timeout=90)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


HANGING = """
import sys, time
from eso_jax import cli, sharding
real, calls = sharding.put_rows, []
def put_rows(*arguments):
    calls.append(1)
    if len(calls) == 13:  # the fifth step, behind an evaluation in two batches of four arrays
        time.sleep(60)
    return real(*arguments)
sharding.put_rows = put_rows
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_step_that_hangs_ends_the_process(base: Config, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(base.override("train.hang_seconds=2", "train.steps=20").to_json())
    done = subprocess.run([sys.executable, "-c", HANGING, "train", str(tmp_path / "run.json"), "--workdir",
                           str(tmp_path / "w")], capture_output=True, text=True, timeout=100)
    assert done.returncode == RunAgain.EXIT, done.stderr
    assert "a step took longer than train.hang_seconds = 2; the last good checkpoint is step 3" in done.stderr
    assert "put_rows" in done.stderr  # where it hangs


def test_a_step_that_is_not_finite_may_be_skipped(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = base.override("train.non_finite=skip")
    kind = type(training.families.get(run))
    real = kind.loss

    def loss(self: Family, weights: Weights, config: Config, tokens: jax.Array, draws: Draws) -> dict[str, jax.Array]:
        terms = real(self, weights, config, tokens, draws)
        return {name: jnp.where(tokens.sum() % 3 == 0, jnp.nan, value) for name, value in terms.items()}

    monkeypatch.setattr(kind, "loss", loss)
    tokens = jnp.zeros((8, 16), jnp.int32)
    state = training.init_state(run)
    after, values = jax.jit(training.train_step, static_argnums=0)(run, state, tokens)
    assert not values["finite"] and int(after.step) == 1
    chex.assert_trees_all_equal((after.params, after.ema, after.optimizer), (state.params, state.ema, state.optimizer))
    _, values = jax.jit(training.train_step, static_argnums=0)(run, state, tokens.at[0, 0].set(1))
    assert values["finite"]


def test_skipped_steps_are_counted_and_too_many_stop(base: Config, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.train_step

    def poisoned(config: Config, state: training.TrainState, tokens: jax.Array) -> tuple:
        state, values = real(config, state, tokens)
        return state, values | {"finite": (state.step < 4) | (state.step > 6)}

    monkeypatch.setattr(training, "train_step", poisoned)
    run = base.override("train.non_finite=skip", "train.log_every=2")
    training.train(run, tmp_path / "w")
    assert {line["step"]: line.get("skipped", 0) for line in metrics.read(tmp_path / "w") if line["step"] % 2 == 0
            and "validation_perplexity" not in line} == {2: 0, 4: 1, 6: 2, 8: 0}
    monkeypatch.setattr(training, "SKIPS_IN_A_ROW", 2)
    with pytest.raises(EsoError, match="at step 6, the last of 3 in a row: the update is not finite"):
        training.train(run, tmp_path / "v")


@pytest.mark.parametrize("said, lost", [
    ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", True), ("DEADLINE_EXCEEDED: barrier", True),
    ("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes", False), ("INVALID_ARGUMENT: shapes", False)])
def test_only_a_lost_peer_is_run_again_without_end(said: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory is a crash: it would come again."""
    error = jax.errors.JaxRuntimeError(said)
    assert not stopping.is_loss(error)  # one process has no peers
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert stopping.is_loss(error) == lost


def test_a_peer_lost_while_saving_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def save_checkpointables_async(self, *_: object) -> None:
            raise self.error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error, kind in ((ValueError("UNKNOWN: Gloo AllGather failed"), RunAgain), (ValueError("shape"), EsoError),
                        (OSError(errno.ENOSPC, "No space left"), EsoError)):
        with pytest.raises(kind):
            checkpoint.Saver(Failing(error), tmp_path, BASE.model).save(3, {})


def test_only_steps_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Exception] = []
    monkeypatch.setattr(multihost, "leave", left.append)
    monkeypatch.setattr(stopping.faulthandler, "dump_traceback", lambda **_: None)
    with stopping.Watchdog(1, lambda: "") as watchdog:
        watchdog.begin()
        watchdog.rest()  # an evaluation
        time.sleep(1.6)
        assert not left


def test_an_experiment_that_asks_for_devices_is_run_after_joining(base: Config, tmp_path: Path) -> None:
    """As experiments/quickstart.py does."""
    (tmp_path / "run.json").write_text(base.override("train.steps=1").to_json())
    (tmp_path / "run.py").write_text("import jax\nfrom eso_jax import config as configs\njax.default_backend()\n"
                                     f"config = configs.from_file({str(tmp_path / 'run.json')!r})\n")
    running = start(tmp_path / "run.py", tmp_path / "w", 2)
    outputs = finish(running)
    assert [process.returncode for process in running] == [0, 0], outputs


def test_all_processes_hear_of_the_writers_mistake(base: Config, tmp_path: Path) -> None:
    """A work directory of another run: both exit with 2 and its words."""
    (tmp_path / "run.json").write_text(base.to_json())
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("precious")
    running = start(tmp_path / "run.json", tmp_path / "w", 2)
    outputs = finish(running)
    assert [process.returncode for process in running] == [2, 2], outputs
    assert all("exists and is not a run's" in output for output in outputs), outputs


def test_a_stopped_run_has_no_watchdog_left(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls train from Python and catches its error lives on."""
    left: list[Exception] = []
    monkeypatch.setattr(multihost, "leave", left.append)
    monkeypatch.setattr(stopping.faulthandler, "dump_traceback", lambda **_: None)
    real = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *arguments: (
        (found := real(*arguments))[0], found[1] | {"finite": found[0].step < 4}))
    with pytest.raises(EsoError, match="is not finite"):
        training.train(base.override("train.hang_seconds=1"), tmp_path / "w")
    time.sleep(2)
    assert not left


def test_a_full_disk_beside_the_checkpoints(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "plot_loss", full)
    with pytest.raises(EsoError, match="the disk is full; the last good checkpoint is step 3; make room and repeat"):
        training.train(base.override("train.steps=3"), tmp_path / "w")


class Refusing:
    """A save that storage does not answer, as it ends."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> None:
        raise self.error


@pytest.mark.parametrize("at_once", [True, False])
def test_a_save_that_storage_does_not_answer_is_made_again(
        at_once: bool, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Of the step that is then at hand; after three in a row the run ends, to be run again. So it does for metrics."""
    monkeypatch.setattr(files, "PAUSE", 0.0)
    real, failures = ocp.training.Checkpointer.save_checkpointables_async, [1]
    error = OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(*arguments: object, **options: object) -> object:
        failures[0] -= 1
        if failures[0] < 0:
            return real(*arguments, **options)
        if at_once:
            raise error
        return Refusing(error)

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", failing)
    training.train(base, tmp_path / "w")
    assert capsys.readouterr().err.count("could not be written (Input/output error); trying again") == 1
    assert checkpoint.steps(tmp_path / "w") == [4, 6, 8] or checkpoint.steps(tmp_path / "w") == [5, 6, 8]
    failures[0] = 10**6
    with pytest.raises(RunAgain, match=r"could not be written \(Input/output error\); there is no checkpoint yet"):
        training.train(base, tmp_path / "v")
    failures[0] = 0
    add, lines = files.append, [2]

    def silent(path: Path, *arguments: str) -> None:
        lines[0] -= 1
        if lines[0] < 0:
            raise RunAgain("storage")
        add(path, *arguments)

    monkeypatch.setattr(files, "append", silent)
    with pytest.raises(RunAgain, match="storage"):
        training.train(base, tmp_path / "u")
    assert len(metrics.read(tmp_path / "u")) == 2


def test_steps_are_listed_where_storage_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error here would leave the other processes waiting. What cannot be told is taken for a checkpoint."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "6").touch()
    (tmp_path / "checkpoints" / "9").symlink_to("9")  # "too many levels of symbolic links"
    stat = os.stat

    def failing(path: object, **options: object) -> os.stat_result:
        if Path(str(path)).name.isdigit():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    assert checkpoint.steps(tmp_path) == [3, 9]


def test_milestones_are_kept(base: Config, tmp_path: Path) -> None:
    training.train(base.override("train.steps=12", "train.save_every=2", "train.keep=1", "train.keep_every=4"),
                   tmp_path / "w")
    assert checkpoint.steps(tmp_path / "w") == [4, 8, 12]


RESTORE = """
import sys, jax, numpy as np
from jax.experimental import multihost_utils
from eso_jax import config, sharding
from eso_jax.data import windows_of
from eso_jax.data.pipeline import batches
from eso_jax.run import checkpoint, multihost, train
from pathlib import Path
workdir, out, *overrides = sys.argv[1:]
multihost.start(Path(workdir) / 'hosts.partial', 60)
run = config.from_file(Path(workdir) / "config.json").override(*overrides)
mesh = sharding.mesh(run.mesh)
with jax.set_mesh(mesh), checkpoint.open_checkpoints(Path(workdir), 3) as checkpoints:
    state = train._restore(checkpoints, Path(workdir), run, mesh)
    rows = sharding.rows_of_process(mesh, run.train.batch_size)
    iterator = batches(windows_of(run, "train"), run.train.batch_size, run.data.seed, rows)
    iterator.set_state({"next_index": int(state.step)})
    batch = sharding.put_rows(next(iterator), mesh, run.train.batch_size)
    found = multihost_utils.process_allgather({"batch": batch, **state.params}, tiled=True)
if multihost.is_writer():
    np.savez(out, **found)
multihost.barrier("end")
"""


def test_a_checkpoint_is_restored_on_any_mesh_and_process_count(base: Config, tmp_path: Path) -> None:
    """Written by one process with 8 devices along fsdp; read by two processes with tensor = 2, and by one with one
    device; and each goes on with the losses of a run that never changed."""
    run, workdir, base = tmp_path / "run.json", tmp_path / "w", base.override("train.steps=9", "train.batch_size=16")
    run.write_text(base.to_json())
    whole = training.train(base, tmp_path / "whole")

    def go(devices: int, *overrides: str) -> None:
        done = subprocess.run([*TRAIN, str(run), "--workdir", str(workdir), *overrides], capture_output=True, text=True,
                              env=emulated(devices))
        assert done.returncode == 0, done.stderr

    go(8, "train.steps=3", "mesh.fsdp=8")
    one = params_of(workdir, ema=False)
    together([[sys.executable, "-c", RESTORE, str(workdir), str(tmp_path / "restored.npz"), "mesh.tensor=2",
               "mesh.fsdp=2"]] * 2, devices=2)
    restored = dict(np.load(tmp_path / "restored.npz"))
    iterator = batches(windows_of(base, "train"), 16, 0)
    for _ in range(4):
        batch = next(iterator)
    np.testing.assert_array_equal(restored.pop("batch"), batch)
    chex.assert_trees_all_equal(restored, jax.device_get(one))
    together([[*TRAIN, str(run), "--workdir", str(workdir), "--multi-host", "mesh.tensor=2", "mesh.fsdp=2",
               "train.steps=6"]] * 2, devices=2)
    together([[*TRAIN, str(run), "--workdir", str(tmp_path / "from"), "--multi-host", f"train.start_from={workdir}",
               "mesh.fsdp=4", "train.steps=1"]] * 2, devices=2)
    assert eso_jax.load(tmp_path / "from").step == 1
    go(1)
    losses, reference = ([line["loss"] for line in step_lines(path)] for path in (workdir, tmp_path / "whole"))
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
    chex.assert_trees_all_close(params_of(workdir), jax.device_get(whole.ema), atol=1e-4)


def test_a_run_of_one_process_waits_for_nobody() -> None:
    multihost.barrier("anything", 1)
    assert multihost.gather("anything", "text") == ["text"]
    assert multihost.agree("anything", None) is None and multihost.agree("anything", "bad") == "bad"
    for kind in (EsoError, RunAgain):
        with pytest.raises(kind, match="^said: so$"):
            multihost.by_writer("anything", lambda kind=kind: (_ for _ in ()).throw(kind("said: so")))
