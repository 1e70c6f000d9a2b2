"""Prove that cached equals uncached, and any batch size another, on your model and machine."""

from __future__ import annotations

import argparse

from eso_jax.cli import options
from eso_jax.cli.files import say
from eso_jax.config import EsoError, require

EXAMPLE = "eso-jax check-cache --workdir /tmp/w"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.of_model(parser)
    parser.add_argument("--rows", type=int, default=8, help="sequences (%(default)s)")
    options.of_precision(parser)


def run(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from eso_jax import families, load
    from eso_jax.order import sort
    from eso_jax.sampling import check

    require(arguments.rows >= 2, "--rows", arguments.rows, "must be at least 2, to compare batch sizes")
    model = load(arguments.workdir, ema=not arguments.raw, dtype=arguments.dtype)
    exact = load(arguments.workdir, ema=not arguments.raw) if arguments.dtype != "float32" else model
    family, config = families.get(model.config), model.config.model
    sampler = family.sampler(model.config)
    if not sampler.cached:
        raise EsoError(f"family.name = {model.config.family.name!r}: its sampler has no cache")
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[arguments.dtype]
    alpha_0 = model.config.family.alpha_0 if arguments.alpha_0 is None else arguments.alpha_0
    failures = 0

    def report(what: str, found: check.Difference, limit: float | None = tolerance) -> None:
        nonlocal failures
        failed = limit is not None and not found.relative <= limit
        failures += failed
        say(f"  {what:<44} {found.worst:.2e}, {found.relative:.1e} of the largest{'  TOO MUCH' if failed else ''}")

    say(f"{model.config.family.name} at step {model.step}, {arguments.dtype}, {arguments.rows} rows, "
        f"{jax.devices()[0].device_kind}; worst difference between logits (limit: {tolerance:g} of the largest)")
    # Four tokens per diffusion step (in each block, for BD3-LM), and one: few programs to compile.
    block = model.config.family.block_size if model.config.family.name == "bd3lm" else config.length
    steps = config.length // block * max(1, round(alpha_0 * block) // 4)
    for policy in ("left-to-right",) if model.config.family.name == "ar" else ("balanced", "one-by-one"):
        keys = jax.random.split(jax.random.key(arguments.seed))
        plan = family.plan(keys[0], model.config, arguments.rows, steps, alpha_0, policy)
        tokens = families.sample(model.weights, model.config, plan, keys[1])
        x = sort(tokens, plan.order)
        say(f"{policy} plan, {plan.nfe} passes, on samples of its own")
        report("cached against uncached", check.cache_error(model.weights, config, sampler, plan, x))
        for size in sorted({1, arguments.rows // 2}):
            report(f"batch of {size} against batch of {arguments.rows}",
                   check.batch_error(model.weights, config, sampler, plan, x, size))
            few = families.sample(model.weights, model.config, plan.rows(np.arange(size)), keys[1])
            same = np.asarray(few == tokens[:size]).mean()
            say(f"  {'  the same tokens drawn':<44} {100 * same:.2f}%")
        if exact is not model:
            ours, theirs = (check.forced_logits(m.weights, config, sampler, plan, x) for m in (model, exact))
            report(f"{arguments.dtype} against float32, both cached", check.compare(ours, theirs, config.mask), None)
    if failures:
        raise EsoError(f"{failures} of the differences are more than rounding: the cache is not exact on this machine; "
                       "please report it with this output")
    say("to rounding, the cache is exact and logits do not depend on the batch size")
