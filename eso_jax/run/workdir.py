"""The work directory of a run: its config, its tokenizer, its lock, and the parameters in it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from eso_jax import config as configs
from eso_jax import files
from eso_jax.config import Config
from eso_jax.data import tokenizers
from eso_jax.data.tokenizers import Tokenizer
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.model.params import Params, init_params, with_shardings
from eso_jax.run import multihost

CONFIG = "config.json"
LOCK = "run.lock"
# What may differ when a run resumes: these fields of train, and all of mesh. What a step computes changes only by
# rounding; `steps` also changes the rates of a schedule.
MAY_CHANGE = ("steps", "accumulate", "attention", "remat", "non_finite", "log_every", "eval_every", "eval_windows",
              "save_every", "keep", "keep_every", "hang_seconds", "profile_steps", "log", "sample_every")


def claim(directory: Path, config: Config, tokenizer: Tokenizer | None = None) -> None:
    """Makes a work directory with a config and a tokenizer, or checks that an existing one is of the same run.

    Raises:
      EsoError: the directory holds another config, or other files than those of a run.
    """
    path = directory / CONFIG
    if path.exists():
        recorded = dataclasses.asdict(configs.from_file(path))
        for section, fields in dataclasses.asdict(config).items():
            for name, value in fields.items():
                before = recorded[section][name]
                may_change = section == "mesh" or section == "train" and name in MAY_CHANGE
                require(before == value or may_change, f"{section}.{name}", value,
                        f"--workdir {directory} holds a run with {before!r}; repeat that, or give another --workdir")
    with files.writing("--workdir", directory):
        if path.exists():
            return save_tokenizer(directory, tokenizer)
        free = not directory.exists() or directory.is_dir() and all(p.suffix == ".partial" for p in directory.iterdir())
        require(free, "--workdir", str(directory), f"exists and is not a run's (no {CONFIG}); give another one")
        directory.mkdir(parents=True, exist_ok=True)
        save_config(directory, config)
        save_tokenizer(directory, tokenizer)


def check_shared(directory: Path, wait: int = 30) -> None:
    """Raises an EsoError, in all processes, unless all of them see the directory that the writer made."""
    deadline = time.monotonic() + wait  # a network file system may show the directory late
    while not (is_there := (directory / CONFIG).is_file()) and time.monotonic() < deadline:
        time.sleep(0.5)
    problem = multihost.agree("shared", None if is_there else "does not see it; give a directory that all hosts share")
    if problem:
        raise EsoError(f"--workdir = {str(directory)!r}: {problem}")


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a work directory for its block, if the file system has locks (on a bucket mounted by
    gcsfuse, only runs of the same host). A killed process releases its lock.

    Raises:
      RunAgain: in all processes, if another run holds the lock, or seems to: a network file system may notice late that
        a host is gone.
    """
    import fcntl

    with files.writing("--workdir", directory):
        file = (directory / LOCK).open("ab")
    with file:

        def take() -> None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise RunAgain(f"--workdir = {str(directory)!r}: another run is training there; stop it, or give "
                               f"another one (if there is none, a host that was lost may still hold {LOCK}: delete "
                               "that file)") from error
            except OSError:  # no locks there
                pass

        multihost.by_writer("lock", take)
        yield


def save_config(directory: Path, config: Config) -> None:
    """Writes config.json, whole or not at all."""
    files.write_whole(directory / CONFIG, config.to_json(), "--workdir")


def save_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> None:
    """Writes tokenizer.json, so that the work directory is complete; nothing for a tokenizer that is only code."""
    if tokenizer is not None and tokenizer.json is not None:
        files.write_whole(directory / tokenizers.FILE, tokenizer.json, "--workdir")


def kept_tokenizer(directory: Path, config: Config) -> Tokenizer | None:
    """The tokenizer in a work directory; None if it has none that fits the model, as after an import, or does not exist
    yet."""
    path, name = directory / tokenizers.FILE, config.data.tokenizer
    if path.is_file():
        tokenizer: Tokenizer = tokenizers.LibraryTokenizer(name.partition("=")[0], path.read_text("utf-8"))
    elif name in tokenizers.CODE:
        tokenizer = tokenizers.CODE[name]()
    else:
        return None
    fits = (tokenizer.vocab_size, tokenizer.mask_id) == (config.model.vocab_size, config.model.mask)
    return tokenizer if fits else None


def read_config(directory: str | Path) -> Config:
    """The config of a work directory; raises an EsoError where there is none."""
    path = Path(directory) / CONFIG
    require(path.is_file(), "--workdir", str(directory), f"not a work directory (no {CONFIG})")
    return configs.from_file(path)


def read(directory: str | Path, ema: bool = True, mesh: Mesh | None = None) -> tuple[Config, int, Params]:
    """(config, step, float32 parameters) of a work directory's newest whole checkpoint.

    Args:
      ema: the averaged parameters rather than the raw ones.
      mesh: where the parameters go, by the rules of eso_jax/sharding.py; None: this process's first device.

    Raises:
      EsoError: the directory is not a run's, or holds no whole checkpoint.
    """
    from eso_jax.run import checkpoint

    config = read_config(directory)
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = with_shardings(shapes, mesh) if mesh is not None else jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return config, *checkpoint.load_params(Path(directory), config.model, abstract, ema)


def create(directory: Path, config: Config, params: Params, tokenizer: Tokenizer | None = None) -> None:
    """Makes a new work directory with a config, parameters and perhaps a tokenizer, for an import. Raises an EsoError
    if it exists."""
    from eso_jax.run import checkpoint

    require(not directory.exists(), "--out", str(directory), "exists already; nothing was written")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    claim(partial, config, tokenizer)
    checkpoint.save_params(partial, config.model, params)
    with files.writing("--out", directory):
        partial.rename(directory)
