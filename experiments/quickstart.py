"""A small Eso-LM from nothing to samples, on a laptop.

Command:   python experiments/quickstart.py --workdir runs/quickstart      (or: bash launch/local.sh)
The same model alone:  eso-jax train quickstart --workdir runs/quickstart

Trains on the source text of Python's own standard library (bytes, no download), and then shows
  1. validation bits per byte beside a byte-bigram model's on the same text,
  2. the NELBO and the importance-weighted bound on the exact likelihood,
  3. generated text,
  4. the cached sampler against MDLM's, which has no cache, at the same number of forward passes.
It leaves metrics, pictures and samples in the work directory. See docs/start.md for what it says, docs/measured.md for
numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np

from eso_jax import Config, FamilyConfig, families, likelihood, load
from eso_jax.cli import exit_code_of
from eso_jax.console import say
from eso_jax.data import Bigram, override, tokenizer_of, windows_of
from eso_jax.decoding import order
from eso_jax.engine import perplexity
from eso_jax.engine.model import Model
from eso_jax.errors import EsoError, require
from eso_jax.files import as_json, write_whole
from eso_jax.quickstart import config
from eso_jax.run.train import train

ORDERS = 16  # of the importance-weighted bound
SCORED = 64  # windows it is measured on
STEPS = 64  # diffusion steps of the samples shown
TIMED = 16  # sequences generated when timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    run = override(config, *arguments.overrides)
    require(run.family.name == "esolm", "family.name", run.family.name,
            "the quickstart shows an esolm; for others use eso-jax train")

    validation = windows_of(run, "validation")[:]
    bigram = bigram_bits_per_byte(run, validation)
    say(f"byte bigram: {bigram:.3f} bits per byte on validation\n\n1. Training")
    train(run, arguments.workdir, {"byte bigram": bigram})
    model = load(arguments.workdir)

    results = {"bigram_bits_per_byte": bigram, **bounds(model, validation)}
    show_samples(model, arguments.workdir)
    results |= race(model)
    write_whole(arguments.workdir / "results.json", as_json(results), "--workdir")
    say(f"\nIn {arguments.workdir}: loss.png, metrics.jsonl, samples.txt, results.json, and the model. Next, try\n"
        f"  {os.path.relpath(sys.executable)} -m eso_jax sample --workdir {arguments.workdir} --num-samples 2 --steps "
        "64 --alpha-0 0.25 --out samples.npz")


def bigram_bits_per_byte(run: Config, validation: np.ndarray) -> float:
    size = tokenizer_of(run).num_bytes(validation)
    if size is None:
        raise EsoError(f"data.tokenizer = {run.data.tokenizer!r}: of some tokens it is not known how many bytes they "
                       "stand for, and the quickstart shows bits per byte; use eso-jax train")
    return Bigram(windows_of(run, "train")[:], run.model.vocab_size).nats(validation) / math.log(2) / size


def bounds(model: Model, validation: np.ndarray) -> dict[str, float | None]:
    """The NELBO on all validation windows, and on the same few windows both bounds."""
    run, tokenizer, key = model.config, model.tokenizer, jax.random.key(0)
    assert tokenizer is not None
    alpha_0 = run.family.alpha_0
    whole = perplexity.nelbo(model, validation, tokenizer, alpha_0, key)
    some = validation[:: max(1, len(validation) // SCORED)][:SCORED].astype(np.int32)
    few = perplexity.nelbo(model, some, tokenizer, alpha_0, key, samples=ORDERS)
    orders = np.asarray(order.likelihood_orders(key, ORDERS, len(some), run.model.length, alpha_0))
    logp = model.log_likelihood(some, orders)
    to_bits = some.size / math.log(2) / (tokenizer.num_bytes(some) or math.nan) / run.model.length
    iw = {count: -float(likelihood.iw_bound(logp[:count])[0].mean()) * to_bits for count in (1, ORDERS)}
    say(f"\n2. Bounds on -log p, bits per byte (alpha_0 = {alpha_0})\n"
        f"   validation, {whole.windows} windows: NELBO {whole.bits_per_byte:.3f} "
        f"+- {whole.standard_error * run.model.length * to_bits:.3f} ({_share(whole)})\n"
        f"   {len(some)} of them: NELBO {few.bits_per_byte:.3f}; decoded one by one, importance-weighted over orders: "
        + ", ".join(f"{bits:.3f} (K = {count})" for count, bits in iw.items())
        + "\n   (two slightly different laws, so K = 1 may lie above the NELBO; see docs/choices.md)")
    return {"nelbo_bits_per_byte": whole.bits_per_byte, "nelbo_bits_per_byte_some": few.bits_per_byte,
            "iw_bits_per_byte_k1": iw[1], f"iw_bits_per_byte_k{ORDERS}": iw[ORDERS]}


def _share(found: perplexity.Perplexity) -> str:
    return ", ".join(f"{term} {nats:.3f}" for term, nats in found.terms.items()) + " nats per token"


def show_samples(model: Model, workdir: Path) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    samples = model.sample(4, steps=STEPS, top_p=0.9, seed=0)
    text = "\n".join(f"--- sample {i}\n{tokenizer.decode(row)}" for i, row in enumerate(samples.tokens))
    write_whole(workdir / "samples.txt", text + "\n", "--workdir")
    passes = len(samples.tokens_per_step)
    say(f"\n3. Generated, {passes} passes for {model.config.model.length} tokens, top-p 0.9\n{text}")


def race(model: Model) -> dict[str, float]:
    """Seconds of the cached sampler and of MDLM's on the same plan and weights: speed does not depend on weights."""
    plan = families.get(model.config).plan(jax.random.key(1), model.config, TIMED, STEPS, model.config.family.alpha_0)
    seconds = {}
    for name in ("esolm", "mdlm"):
        config = dataclasses.replace(model.config, family=FamilyConfig(name=name))
        other = dataclasses.replace(model, config=config)
        for _ in range(2):  # the first run compiles
            seconds[name] = other.sample(TIMED, top_p=0.9, plan=plan).seconds
    ratio = seconds["mdlm"] / seconds["esolm"]
    say(f"\n4. {TIMED} sequences of {model.config.model.length} tokens, {plan.nfe} passes, draws included, "
        f"compilation not: cached {seconds['esolm']:.2f} s, MDLM's (no cache) {seconds['mdlm']:.2f} s: "
        f"{ratio:.1f}x, by the cache alone")
    return {"seconds_esolm": seconds["esolm"], "seconds_mdlm": seconds["mdlm"], "speed_ratio": ratio}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
