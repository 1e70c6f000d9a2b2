"""A page that plays generations, side by side, in any browser."""

from __future__ import annotations

import argparse

from eso_jax.console import say
from eso_jax.files import check_out, write_whole

EXAMPLE = "eso-jax view esolm.npz ar.npz --out page.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", nargs="+", metavar="NPZ", help=".npz of eso-jax sample --record; one or several")
    parser.add_argument("--out", required=True, help=".html, with all that it needs in it")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax.viewer.page import named, page

    check_out(arguments.out)
    write_whole(arguments.out, page(named(arguments.samples)))
    say(f"wrote {arguments.out}")
