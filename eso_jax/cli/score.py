"""Exact log-likelihood given orders, and the importance-weighted bound."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eso_jax.cli import options
from eso_jax.cli.files import read_array, read_plan
from eso_jax.console import say
from eso_jax.errors import EsoError, require
from eso_jax.files import check_out, npz, write_whole

EXAMPLE = "eso-jax score --workdir /tmp/w --tokens x.npy --num-orders 16 --alpha-0 0.25 --out s.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.of_model(parser)
    parser.add_argument("--tokens", required=True, help=".npy, int [B, L], or the .npz of eso-jax sample")
    parser.add_argument("--orders", help=".npy, int [K, B, L], or a .npz with orders; drawn if absent")
    parser.add_argument("--num-orders", type=int, help="K, orders to draw per sequence (1)")
    parser.add_argument("--plan", help=".npz of eso-jax sample: score along its plan, as the sampler would; "
                                      "writes logp [B] and logp_in_order [B, L]")
    parser.add_argument("--given", help=".npy, bool [B, L], or int [B, L] with the mask where a token is not given: "
                                       "score the others, given these (Eso-LM (B), AR); writes logp [B] and "
                                       "logp_by_position [B, L]")
    options.of_precision(parser)
    options.of_devices(parser)
    parser.add_argument("--out", required=True,
                        help=".npz with logp_per_order [K, B], iw_bound [B], iw_bound_standard_error [B], in nats")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from eso_jax import families, likelihood, load
    from eso_jax.engine import importance

    check_out(arguments.out)
    model = load(arguments.workdir, ema=not arguments.raw, dtype=arguments.dtype, tensor=arguments.tensor,
                 batch_size=arguments.batch_size, attention=arguments.attention)
    tokens = read_array(arguments.tokens, "--tokens", "tokens")
    if not arguments.plan:  # which may leave masks
        likelihood.check_tokens(tokens, model.config)
    given = [name for name in ("orders", "plan", "given") if getattr(arguments, name)]
    drawn = arguments.num_orders is not None or arguments.alpha_0 is not None
    if given and (len(given) > 1 or drawn):
        raise EsoError(f"--{given[0]} = {getattr(arguments, given[0])!r}: give orders, or a plan, or what is given, or "
                       "--num-orders and --alpha-0 to draw orders; only one of them")
    if arguments.given:
        known = _known(read_array(arguments.given, "--given", "given"), tokens, model.config.model.mask)
        logp = likelihood.conditionals(model, tokens, known, ~known).logp
        write_whole(arguments.out, npz(logp=logp.sum(1), logp_by_position=logp))
        say(f"{len(tokens)} sequences, {known.mean():.1%} of their tokens given: log p of the others = "
            f"{logp.sum(1).mean():.4f} nats on average ({-logp.sum() / (~known).sum():.4f} nats per token); "
            f"in {arguments.out}")
        return
    if arguments.plan:
        plan, arrays = read_plan(arguments.plan)
        require("law_of_plan" not in arrays, "--plan", arguments.plan, "was found by a decoder whose samples have no "
                "plan's law; sample with --record and sum the logp of what was decoded")
        logp = model.plan_log_prob(tokens, plan)
        count = np.broadcast_to(plan.decoded, logp.shape).sum()
        write_whole(arguments.out, npz(logp=logp.sum(1), logp_in_order=logp))
        say(f"{len(tokens)} sequences along their plan: log p = {logp.sum(1).mean():.4f} nats on average "
            f"({-logp.sum() / max(count, 1):.4f} nats per token); in {arguments.out}")
        return
    if arguments.orders:
        logp = model.log_likelihood(tokens, read_array(arguments.orders, "--orders", "orders"))
    else:
        alpha_0 = families.alpha_0_of(model.config, arguments.alpha_0)
        partial = Path(arguments.out + ".partial")
        count = 1 if arguments.num_orders is None else arguments.num_orders
        logp = importance.log_prob(model, tokens, count, alpha_0, arguments.seed, partial)
    bound, error = likelihood.iw_bound(logp)
    write_whole(arguments.out, npz(logp_per_order=logp, iw_bound=bound, iw_bound_standard_error=error))
    Path(arguments.out + ".partial").unlink(missing_ok=True)
    orders = "1 order" if len(logp) == 1 else f"{len(logp)} orders"
    sign = "=" if families.get(model.config).exact_bound else ">="
    say(f"{len(tokens)} sequences, {orders} each: log p {sign} {bound.mean():.4f} nats on average "
        f"({-bound.mean() / tokens.shape[1]:.4f} nats per token); in {arguments.out}")


def _known(given: Any, tokens: Any, mask: int) -> Any:
    """Which tokens are given, bool [B, L]."""
    require(given.shape == tokens.shape and given.dtype.kind in "biu", "--given", f"{given.dtype} {given.shape}",
            f"must be bool or integers {tokens.shape}, as --tokens")
    known = given if given.dtype == bool else given != mask
    require(given.dtype == bool or bool((given == tokens)[known].all()), "--given", "other tokens",
            "where it is not the mask, it must be as --tokens")
    require(not known.all(), "--given", "all tokens", "leave some to score")
    return known
