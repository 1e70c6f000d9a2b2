"""Check that cached logits equal uncached ones, with any batch size, on your model and machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eso_jax.cli import options
from eso_jax.console import say
from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.engine.model import Model

EXAMPLE = "eso-jax check-cache --workdir /tmp/w"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.of_model(parser)
    options.of_devices(parser, 8)
    options.of_precision(parser)


def run(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from eso_jax import families, load, sharding
    from eso_jax.decoding import check
    from eso_jax.engine.rows import REMEDY, catch_out_of_memory

    rows = arguments.batch_size
    require(rows >= 2, "--batch-size", rows, "must be at least 2, to compare batch sizes")

    def model_in(dtype: str) -> Model:
        return load(arguments.workdir, not arguments.raw, dtype, arguments.tensor, rows, arguments.attention)

    model = model_in(arguments.dtype)
    exact = model_in("float32") if arguments.dtype != "float32" else model
    family, config = families.get(model.config), model.config.model
    sampler = family.sampler(model.config)
    if not sampler.cached:
        raise EsoError(f"family.name = {model.config.family.name!r}: its sampler has no cache")
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[arguments.dtype]
    alpha_0 = families.alpha_0_of(model.config, arguments.alpha_0)
    # On many devices a few rows may be filled up to as many as all: nothing to compare.
    full = model.size(rows, rows)
    sizes = sorted(size for size in {1, rows // 2} if model.size(size, size) < full)
    failures = 0

    def report(comparison: str, difference: check.Difference, limit: float | None = tolerance) -> None:
        nonlocal failures
        failed = limit is not None and not difference.relative <= limit
        failures += failed
        say(f"  {comparison:<44} {difference.worst:.2e}, {difference.relative:.1e} of the largest"
            f"{'  TOO MUCH' if failed else ''}")

    say(f"{model.config.family.name} at step {model.step}, {arguments.dtype}, {rows} rows on "
        f"{sharding.describe(model.mesh)}, {jax.devices()[0].device_kind}; worst difference between logits (limit: "
        f"{tolerance:g} of the largest; 0 is equal to the last bit)")
    # Four tokens per diffusion step (in each block, for BD3-LM), and one: few programs to compile.
    block = family.block(model.config) or config.length
    steps = config.length // block * max(1, round(alpha_0 * block) // 4)

    def compare(policy: str, given: np.ndarray | None = None) -> np.ndarray:
        key = jax.random.key(arguments.seed)
        if given is None:
            given = np.full((rows, config.length), config.mask)
            plan = family.plan(key, model.config, rows, steps, alpha_0, policy)
        else:
            plan = family.plan(jax.random.split(key, rows), model.config, rows, steps, alpha_0, policy,
                               known=given != config.mask)

        def draw(size: int) -> np.ndarray:
            return model.sample(1, given=given[:size], plan=plan.rows(np.arange(size)), seed=arguments.seed).tokens

        tokens = draw(rows)
        x = np.take_along_axis(tokens, np.asarray(plan.order), axis=1)
        say(f"{policy} plan, {plan.nfe} passes, on samples of its own"
            + (", each row behind tokens that are given" if np.any(plan.given) else ""))
        report("cached against uncached", check.cache_error(model, sampler, plan, x))
        for size in sizes:
            report(f"batch of {size} against batch of {rows}", check.batch_error(model, sampler, plan, x, size))
            say(f"  {'  the same tokens drawn':<44} {100 * (draw(size) == tokens[:size]).mean():.2f}%")
        if exact is not model:
            report(f"{arguments.dtype} against float32, both cached",
                   check.precision_error(model, exact, sampler, plan, x), None)
        return tokens

    with catch_out_of_memory(f"--batch-size = {rows}", REMEDY):
        for policy in family.policies:
            tokens = compare(policy)
        known = np.arange(config.length) < (1 + np.arange(rows))[:, None] * config.length // (1 + rows)
        try:
            family.check_known(model.config, known)
        except EsoError:
            say("it cannot be given a prompt, so that nothing is compared behind one")
        else:
            compare(policy, np.where(known, tokens, config.mask))
    if failures:
        raise EsoError(f"{failures} of the differences are more than rounding: the cache is not exact on this machine; "
                       "please report it with this output")
    if sizes:
        say("to rounding, the cache is exact and logits do not depend on the batch size")
    else:
        say(f"to rounding, the cache is exact; no batch sizes were compared, since these devices fill up 1 to "
            f"{full} rows to {full}: give a --batch-size of {full + 1} or more for that")
