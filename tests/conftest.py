"""What the tests share: small random models and the golden ones."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Tests compile the same small programs again and again, in many processes: share them. Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "eso-jax-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")  # a shape that fits by chance is a mistake
# To compile is most of what tests do. They and their child processes do it quickly, to slower programs, whose fusions
# XLA makes in its older way, if it has one, and each in one part, not in 32: the cores are busy with other tests.
# Programs as users have them: XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
                      "--xla_cpu_parallel_codegen_split_count=1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from eso_jax import families, sharding  # noqa: E402
from eso_jax.cli import main  # noqa: E402
from eso_jax.config import SETTINGS, Config, FamilyConfig, ModelConfig, family_fields  # noqa: E402
from eso_jax.engine.rows import Engine  # noqa: E402
from eso_jax.interop import import_checkpoint  # noqa: E402
from eso_jax.model.params import Params, Weights, fold, init_params, unstack  # noqa: E402
from eso_jax.run import workdir  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"

# The files that take longest begin first: no process is left alone with one of them at the end.
LONGEST = ("test_faults.py", "test_mesh.py", "test_train.py", "test_cli.py", "test_experiments.py",
           "test_own_family.py")

# For `.compile(USUAL)`, where a test reads a program or its memory: HLO as users have it.
USUAL: dict[str, str | bool] = {"xla_backend_extra_options": ""}

# Whether the kernels for GPUs are interpreted in tests. On a GPU (JAX_PLATFORMS=cuda) they run.
INTERPRET = os.environ["JAX_PLATFORMS"] != "cuda"

Run = Callable[..., str]

# A run of a few seconds, but for its data.
BASE = Config().override(
    "model.length=16", "model.width=16", "model.layers=2", "model.heads=2", "model.cond_dim=8", "model.dropout=0.1",
    "family.alpha_0=0.5", "train.batch_size=8", "train.steps=8", "train.warmup=2", "train.learning_rate=0.01",
    "train.log_every=1", "train.eval_every=4", "train.eval_windows=16", "train.save_every=3",
    "train.compute_dtype=float32")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops the compiled programs after a file that leaves many: each holds several memory maps, and Linux gives a
    process 65,530. Past them the compiler fails with a segmentation fault. And no file turns optimizations on for
    all that come after it."""
    fast = jax.config.values["jax_disable_most_optimizations"]
    yield
    assert jax.config.values["jax_disable_most_optimizations"] == fast
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs as users have them, for a test that computes for longer than it compiles."""
    fast = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", fast)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """BASE with one layer, on a small corpus: what a run does with its state, its data and its files."""
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_text("for i in range(10):\n    print(i)\n" * 200)
    return BASE.override(f"data.source={path}", "model.layers=1")


@contextlib.contextmanager
def without_shape_checks() -> Iterator[None]:
    """For lowering, which puts descriptions where arrays belong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    with without_shape_checks():
        yield


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def emulated(devices: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    return {**os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}


def launch(commands: list[list[str]], devices: int = 1, **environment: str) -> list[subprocess.Popen]:
    """Starts commands as the processes of one run, with so many devices each; their stderr is kept."""
    env = emulated(devices) | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
                               "JAX_NUM_PROCESSES": str(len(commands)), **environment}
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env | {"JAX_PROCESS_ID": str(index)})
            for index, command in enumerate(commands)]


def together(commands: list[list[str]], devices: int, limit: int = 300) -> list[str]:
    """Runs commands as the processes of one run; what they said on stderr, once all have ended well.

    They compile side by side: only the first one could read the cache (the programs of the others are under keys of
    their own, and never written), and Gloo gives up where one is 30 s before another at their first collective."""
    processes = launch(commands, devices, JAX_ENABLE_COMPILATION_CACHE="0")
    outputs = [process.communicate(timeout=limit)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(outputs)
    return outputs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often tests/test_faults.py kills a run")


def brief(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test: the short run keeps those that are chosen."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process and returns its stderr; `code` is the exit code it must have."""

    def call(*arguments: object, code: int = 0) -> str:
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own
            found = int(stop.code or 0)
        printed = capsys.readouterr()
        assert found == code, printed.err
        if code == 2:
            assert len(printed.err.splitlines()) == 1 and "error: " in printed.err, printed.err
        return printed.err + printed.out

    return call


class Golden(NamedTuple):
    """An imported golden model: its config and its weights, stacked and unstacked."""

    config: Config
    weights: Weights
    unstacked: Weights


def golden(file: str, family: str) -> Golden:
    config, params = import_checkpoint(GOLDENS / f"{file}_tiny.safetensors", str(GOLDENS / "config.json"), family)
    weights = fold(config.model, params)
    return Golden(config, weights, unstack(weights))


@pytest.fixture(scope="session")
def cases() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "cases.npz"))


@contextlib.contextmanager
def renamed(prefix: str) -> Iterator[None]:
    """All families under other names alone, within its block."""
    known, settings = dict(families.BY_NAME), dict(SETTINGS)
    families.BY_NAME.clear()
    SETTINGS.clear()
    try:
        for name, family in known.items():
            families.register(dataclasses.replace(family, name=prefix + name))
        yield
    finally:
        for table, before in ((families.BY_NAME, known), (SETTINGS, settings)):
            table.clear()
            table.update(before)  # type: ignore[attr-defined]


def as_family(name: str) -> list[str]:
    """Overrides for a small model of a family: alpha_0 = 1/2 or blocks of 4, where it has such a setting."""
    owners = family_fields()
    return [f"family.name={name}", *(f"family.{field}={value}" for field, value in (("alpha_0", 0.5), ("block_size", 4))
                                     if name in owners[field])]


def tiny_config(family: str = "esolm", length: int = 12, vocab_size: int = 9, **fields: object) -> Config:
    """A model of two small layers."""
    model = ModelConfig(length=length, vocab_size=vocab_size, width=16, layers=2, heads=2, cond_dim=8, dropout=0.0)
    return Config(model=model, family=FamilyConfig(name=family, **fields))  # type: ignore[arg-type]


def random_params(model: ModelConfig, seed: int = 0, scale: float = 0.3) -> Params:
    """Parameters that leave nothing at its initial zero, so that every path matters."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return {name: jnp.asarray(("norm" in name) + scale * rng.standard_normal(x.shape), jnp.float32)
            for name, x in shapes.items()}


def random_weights(model: ModelConfig, seed: int = 0, scale: float = 0.3) -> Weights:
    return unstack(fold(model, random_params(model, seed, scale)))


def engine(config: Config, weights: Weights, batch_size: int = 64) -> Engine:
    """Weights on one device, ready to run."""
    return Engine(config, weights, sharding.inference_mesh(config.model, devices=jax.devices()[:1]), batch_size)


def params_of(directory: Path, ema: bool = True) -> Params:
    """The float32 parameters of a work directory."""
    return workdir.read(directory, ema)[2]


def random_tokens(config: Config, batch: int, seed: int = 0) -> jax.Array:
    """Clean tokens: the mask is the last id."""
    shape = (batch, config.model.length)
    return jax.random.randint(jax.random.key(seed), shape, 0, config.model.vocab_size - 1).astype(jnp.int32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a small model after four steps."""
    from eso_jax.run.train import train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.py").write_text("x = 1\nprint(x)\n" * 300)
    train(BASE.override(f"data.source={folder / 'text.py'}", "train.steps=4"), folder / "w")
    return folder / "w"
