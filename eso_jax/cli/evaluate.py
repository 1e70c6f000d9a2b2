"""The NELBO on held-out text, with its standard error."""

from __future__ import annotations

import argparse

from eso_jax.cli import options
from eso_jax.console import say
from eso_jax.errors import EsoError, require
from eso_jax.files import as_json, check_out, write_whole

EXAMPLE = "eso-jax eval --workdir /tmp/w --alpha-0 0.25 --out eval.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.of_model(parser)
    parser.add_argument("--split", choices=["train", "validation", "test", "all"],
                        help="part of the text (validation; of raw text given by --source, all)")
    parser.add_argument("--source", help="other text than the training data's: a prepared folder (eso-jax data), "
                        "or a folder, a file or a glob of raw text")
    parser.add_argument("--num-windows", type=int, default=512, help="windows, evenly spaced (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="Monte Carlo samples per window (%(default)s)")
    options.of_precision(parser)
    options.of_devices(parser)
    parser.add_argument("--out", default="eval.json", help="JSON (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    import jax

    from eso_jax import families, load
    from eso_jax.data import evenly_spaced, is_prepared, windows_of
    from eso_jax.engine import perplexity

    check_out(arguments.out)
    model = load(arguments.workdir, ema=not arguments.raw, dtype=arguments.dtype, tensor=arguments.tensor,
                 batch_size=arguments.batch_size, attention=arguments.attention)
    if model.tokenizer is None:
        raise EsoError(f"--workdir = {arguments.workdir!r}: its vocabulary of {model.config.model.vocab_size} fits no "
                       "tokenizer; use eso-jax score with --tokens")
    alpha_0 = families.alpha_0_of(model.config, arguments.alpha_0)
    for name in ("num_windows", "samples"):
        require(getattr(arguments, name) >= 1, f"--{name.replace('_', '-')}", getattr(arguments, name),
                "must be at least 1")
    raw = arguments.source is not None and not is_prepared(arguments.source)
    split = arguments.split or ("all" if raw else "validation")
    windows = windows_of(model.config, split, arguments.source, model.tokenizer)
    source = model.config.data.source if arguments.source is None else arguments.source
    result = perplexity.nelbo(model, evenly_spaced(windows, arguments.num_windows), model.tokenizer, alpha_0,
                             jax.random.key(arguments.seed), arguments.samples)
    write_whole(arguments.out, as_json({"alpha_0": alpha_0, "step": model.step, "source": source, "split": split,
                                        "dtype": arguments.dtype,
                                        **result.to_json()}))
    say(f"{model.config.family.name} at step {model.step}, alpha_0 = {alpha_0}, {result.windows} windows of "
        f"{model.config.model.length} tokens ({split} of {source})")
    for term, nats in result.terms.items():
        say(f"  {term:<12} {nats:.4f} nats per token")
    kind = "NLL  " if families.get(model.config).exact_bound else "NELBO"
    say(f"  {kind}        {result.nats_per_token:.4f} +- {result.standard_error:.4f} nats per token"
        f" = {result.bits} = PPL {result.perplexity:.3f}")
    say(f"wrote {arguments.out}")
