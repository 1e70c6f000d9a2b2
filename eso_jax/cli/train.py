"""Train an experiment, or resume its training."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "eso-jax train quickstart --workdir /tmp/w train.steps=100"
USAGE = "%(prog)s [-h] experiment --workdir WORKDIR [--multi-host] [section.field=value ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="FILE.py, FILE.py:RUN, a config.json, or quickstart")
    parser.add_argument("--workdir", required=True, help="made, or resumed from if it holds this run")
    parser.add_argument("--multi-host", action="store_true", help="join the other processes of the run: of Slurm, of a "
                        "TPU pod, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax import config
    from eso_jax.run import multihost, stopping

    workdir = Path(arguments.workdir)
    if arguments.multi_host:  # before the experiment is run, which may ask JAX for its devices
        multihost.start(workdir / "hosts.partial")
    from eso_jax.data import override
    from eso_jax.run.train import train

    with stopping.together():
        train(override(config.from_file(arguments.experiment), *arguments.overrides), workdir)
