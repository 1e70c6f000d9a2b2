"""Make a work directory from the authors' weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from eso_jax.cli.files import say
from eso_jax.config import FAMILIES

EXAMPLE = "eso-jax import eso.safetensors --config sizes.json --out /tmp/w"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a .safetensors file")
    parser.add_argument("--out", required=True, help="the new work directory; an existing one is refused")
    parser.add_argument("--family", default="esolm", choices=FAMILIES,
                        help="what it was trained as (%(default)s)")
    parser.add_argument("--config", help="JSON of the sizes: hidden_size, n_heads, n_blocks, cond_dim, length, "
                                        "vocab_size, mask_id, and block_size for BD3-LM")
    parser.add_argument("--alpha-0", type=float, default=1.0, help="an Eso-LM's training value (%(default)s)")
    parser.add_argument("--start-id", type=int, help="AR: the token it was trained to begin with (the mask)")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax import workdir
    from eso_jax.reference import import_checkpoint

    config, params = import_checkpoint(Path(arguments.src), arguments.config, arguments.family, arguments.alpha_0,
                                       arguments.start_id)
    workdir.create(Path(arguments.out), config, params)
    say(f"{config.family.name}: {len(params)} tensors, {sum(x.size for x in params.values()):,} parameters, "
        f"in {arguments.out}")
