"""Measure the samplers on random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from eso_jax.files import check_out

EXAMPLE = "eso-jax bench sampling --preset cpu --out bench.json"
USAGE = "%(prog)s [-h] sampling [model.field=value ...] --preset PRESET --out OUT [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["sampling"], help="what to measure")
    parser.add_argument("--preset", required=True, choices=["cpu", "table11", "table13"],
                        help="cpu: 256 x 8 layers, L = 2048, float32; table11, table13: the paper's, for a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--batches", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--repeats", type=int, default=3, help="generations timed, for the median (%(default)s)")
    parser.add_argument("--out", required=True, help=".json; a table (.md) and a picture (.png) are written beside it")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax.evaluation import throughput

    check_out(arguments.out)
    throughput.run(arguments.preset, Path(arguments.out), overrides=arguments.overrides, lengths=arguments.lengths,
                   batches=arguments.batches, repeats=arguments.repeats)
