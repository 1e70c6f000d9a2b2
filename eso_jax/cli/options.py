"""Options that several commands share."""

from __future__ import annotations

import argparse

from eso_jax.config import ATTENTION


def of_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and at which alpha_0."""
    parser.add_argument("--workdir", required=True, help="a work directory, trained or imported")
    parser.add_argument("--raw", action="store_true", help="use the raw parameters, not their moving average")
    parser.add_argument("--seed", type=seed, default=0, help="of all randomness (%(default)s)")
    parser.add_argument("--alpha-0", type=float, help="share of tokens left to diffusion (the training value)")


def of_devices(parser: argparse.ArgumentParser, default: int | None = 64) -> None:
    """How a model and its rows are split over the devices; results do not depend on it."""
    parser.add_argument("--tensor", type=int, default=1, help="how many devices share one copy of the model; the "
                        "other devices hold further copies (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=default, help="sequences in one pass, over all "
                        "devices (" + ("%(default)s" if default else "the judge's own") + ")")


def of_precision(parser: argparse.ArgumentParser) -> None:
    """The type of numbers, and the backend of attention."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the weights, of matrix products and of the cache (%(default)s)")
    parser.add_argument("--attention", choices=ATTENTION, default="auto",
                        help="what computes it (%(default)s); fused kernels take bfloat16 where there is no cache, and "
                        "plain turns them off, with a cache as well")


def text(given: str) -> str:
    """The type of an option that is text, not a path."""
    try:
        given.encode()
    except UnicodeEncodeError as error:  # bytes from the shell that are no text
        raise argparse.ArgumentTypeError(f"{given!r}: is not UTF-8") from error
    return given


def seed(text: str) -> int:
    """The type of an option that is a seed."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be in [0, 2**32)")
    return int(text)
