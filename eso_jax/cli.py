"""The command line: `eso-jax COMMAND`, the same as `python -m eso_jax COMMAND`.

People read stderr; machines read the file named by --out. A mistake in the input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from eso_jax.config import FAMILIES, EsoError, require
from eso_jax.sampling.plan import POLICIES


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse cannot mix options with an open list of arguments, so overrides are what is left over.
    takes_overrides = arguments.run in (train, bench)
    if rest and (not takes_overrides or any(argument.startswith("-") for argument in rest)):
        hint = "; write overrides as section.field=value, without --" if takes_overrides else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    arguments.overrides = rest
    _keep_compilations()
    return guarded(lambda: arguments.run(arguments))


def guarded(action: Callable[[], None]) -> int:
    """Runs an action; the exit code, with the user's mistakes and interruptions said in a line."""
    try:
        action()
    except EsoError as error:
        print(f"eso-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eso-jax: interrupted; by the same command, training goes on from its last checkpoint and scoring "
              "from its last orders", file=sys.stderr)
        return 130
    return 0


def _keep_compilations() -> None:
    """Compiled programs are kept on disk for the next run, unless the user has said where or whether (JAX's own
    JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "eso-jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def train(arguments: argparse.Namespace) -> None:
    from eso_jax import config
    from eso_jax.train import train

    train(config.from_file(arguments.experiment).override(*arguments.overrides), Path(arguments.workdir))


def evaluate(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from eso_jax import load
    from eso_jax.data import windows_of
    from eso_jax.data.pipeline import eval_batches
    from eso_jax.evaluation import perplexity

    _check_out(arguments.out)
    model = load(arguments.workdir, ema=not arguments.raw)
    if model.tokenizer is None:
        raise EsoError(f"--workdir = {arguments.workdir!r}: its vocabulary of {model.config.model.vocab_size} fits no "
                       "tokenizer; use eso-jax score with --tokens")
    alpha_0 = model.config.family.alpha_0 if arguments.alpha_0 is None else arguments.alpha_0
    require(0 <= alpha_0 <= 1, "--alpha-0", alpha_0, "must be in [0, 1]")
    for name in ("num_windows", "samples"):
        require(getattr(arguments, name) >= 1, f"--{name.replace('_', '-')}", getattr(arguments, name),
                "must be at least 1")
    split = arguments.split or ("all" if arguments.source else "validation")
    windows = windows_of(model.config, split, arguments.source)
    windows = np.concatenate(list(eval_batches(windows, 64, arguments.num_windows)))
    found = perplexity.nelbo(model.weights, model.config, windows, model.tokenizer, alpha_0,
                             jax.random.key(arguments.seed), samples=arguments.samples)
    _say(f"{model.config.family.name} at step {model.step}, alpha_0 = {alpha_0}, {found.windows} windows of "
         f"{model.config.model.length} tokens ({split})")
    for term, nats in found.terms.items():
        _say(f"  {term:<12} {nats:.4f} nats per token")
    kind = "NLL  " if model.config.family.name == "ar" else "NELBO"
    _say(f"  {kind}        {found.nats_per_token:.4f} +- {found.standard_error:.4f} nats per token"
         f" = {found.bits_per_byte:.4f} bits per byte = PPL {found.perplexity:.3f}")
    _write_json(arguments.out, {"alpha_0": alpha_0, "step": model.step, "split": split, **found.to_json()})


def score(arguments: argparse.Namespace) -> None:
    from eso_jax import likelihood, load
    from eso_jax.evaluation import importance

    _check_out(arguments.out)
    model = load(arguments.workdir, ema=not arguments.raw)
    tokens = _read_array(arguments.tokens, "--tokens", "tokens")
    likelihood.check_tokens(tokens, model.config)
    given = [name for name in ("orders", "plan") if getattr(arguments, name)]
    drawn = arguments.num_orders is not None or arguments.alpha_0 is not None
    if given and (len(given) > 1 or drawn):
        raise EsoError(f"--{given[0]} = {getattr(arguments, given[0])!r}: give orders, or a plan, or --num-orders and "
                       "--alpha-0 to draw orders; only one of them")
    if arguments.plan:
        logp = model.plan_log_prob(tokens, read_plan(arguments.plan))
        _say(f"{len(tokens)} sequences along their plan: log p = {logp.sum(1).mean():.4f} nats on average "
             f"({-logp.mean():.4f} nats per token)")
        _write_npz(arguments.out, logp=logp.sum(1), logp_in_order=logp)
        return
    if arguments.orders:
        logp = model.log_likelihood(tokens, _read_array(arguments.orders, "--orders", "orders"))
    else:
        default = 0.0 if model.config.family.name == "ar" else model.config.family.alpha_0
        alpha_0 = default if arguments.alpha_0 is None else arguments.alpha_0
        require(0 <= alpha_0 <= 1, "--alpha-0", alpha_0, "must be in [0, 1]")
        require(alpha_0 == default or model.config.family.name.startswith("esolm"), "--alpha-0", alpha_0,
                f"only Eso-LMs have it; leave it out for family.name = {model.config.family.name!r}")
        partial = Path(arguments.out + ".partial")
        count = 1 if arguments.num_orders is None else arguments.num_orders
        logp = importance.log_prob(model.weights, model.config, tokens, count, alpha_0, arguments.seed, partial)
    bound, error = likelihood.iw_bound(logp)
    _say(f"{len(tokens)} sequences, {len(logp)} orders each: log p >= {bound.mean():.4f} nats on average "
         f"({-bound.mean() / tokens.shape[1]:.4f} nats per token)")
    _write_npz(arguments.out, logp_per_order=logp, iw_bound=bound, iw_bound_standard_error=error)
    Path(arguments.out + ".partial").unlink(missing_ok=True)


def sample(arguments: argparse.Namespace) -> None:
    import numpy as np

    from eso_jax import load

    _check_out(arguments.out)
    model = load(arguments.workdir, ema=not arguments.raw, dtype=arguments.dtype, tensor=arguments.tensor)
    plan = arguments.plan
    if plan and plan.endswith(".npz"):
        if arguments.steps is not None or arguments.alpha_0 is not None:
            raise EsoError(f"--plan = {plan!r}: holds a whole plan; leave out --steps and --alpha-0")
        plan = read_plan(plan)
    steps = 128 if arguments.steps is None else arguments.steps
    found = model.sample(arguments.num_samples, steps, arguments.alpha_0, arguments.top_p,
                         arguments.temperature, arguments.seed, arguments.batch_size, min_p=arguments.min_p, plan=plan,
                         num_tries=arguments.num_tries, min_entropy=arguments.min_entropy)
    text = [model.tokenizer.decode(row) for row in found.tokens] if model.tokenizer else []
    extra: dict[str, Any] = {"text": np.array(text)} if text else {}
    _write_npz(arguments.out, tokens=found.tokens, order=found.order, tokens_per_step=found.tokens_per_step,
               diffusion=found.diffusion, tries=found.tries, **extra)
    for index, sequence in enumerate(text[:arguments.show]):
        _say(f"--- sample {index}\n{sequence}")
    if arguments.num_tries > 1:
        _say(f"{(found.tries > 1).sum()} of {len(found.tries)} samples drawn again, {found.tries.sum()} draws in all")
    running = found.seconds - found.compile_seconds
    _say(f"NFE {len(found.tokens_per_step)} per batch; {found.tokens.size} tokens in {found.seconds:.2f} s: "
         f"{found.tokens.size / found.seconds:.0f} tokens/s with compilation, "
         f"{found.tokens.size / running:.0f} without its {found.compile_seconds:.2f} s")


def check_cache(arguments: argparse.Namespace) -> None:
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
        _say(f"  {what:<44} {found.worst:.2e}, {found.relative:.1e} of the largest{'  TOO MUCH' if failed else ''}")

    _say(f"{model.config.family.name} at step {model.step}, {arguments.dtype}, {arguments.rows} rows, "
         f"{jax.devices()[0].device_kind}; worst difference between logits (limit: {tolerance:g} of the largest)")
    # Four tokens per diffusion step (in each block, for BD3-LM), and one: few programs to compile.
    block = model.config.family.block_size if model.config.family.name == "bd3lm" else config.length
    steps = config.length // block * max(1, round(alpha_0 * block) // 4)
    for policy in ("left-to-right",) if model.config.family.name == "ar" else ("balanced", "one-by-one"):
        keys = jax.random.split(jax.random.key(arguments.seed))
        plan = family.plan(keys[0], model.config, arguments.rows, steps, alpha_0, policy)
        tokens = families.sample(model.weights, model.config, plan, keys[1])
        x = sort(tokens, plan.order)
        _say(f"{policy} plan, {plan.nfe} passes, on samples of its own")
        report("cached against uncached", check.cache_error(model.weights, config, sampler, plan, x))
        for size in sorted({1, arguments.rows // 2}):
            report(f"batch of {size} against batch of {arguments.rows}",
                   check.batch_error(model.weights, config, sampler, plan, x, size))
            few = families.sample(model.weights, model.config, plan.rows(np.arange(size)), keys[1])
            same = np.asarray(few == tokens[:size]).mean()
            _say(f"  {'  the same tokens drawn':<44} {100 * same:.2f}%")
        if exact is not model:
            ours, theirs = (check.forced_logits(m.weights, config, sampler, plan, x) for m in (model, exact))
            report(f"{arguments.dtype} against float32, both cached", check.compare(ours, theirs, config.mask), None)
    if failures:
        raise EsoError(f"{failures} of the differences are more than rounding: the cache is not exact on this machine; "
                       "please report it with this output")
    _say("to rounding, the cache is exact and logits do not depend on the batch size")


def bench(arguments: argparse.Namespace) -> None:
    from eso_jax.evaluation import throughput

    _check_out(arguments.out)
    throughput.run(arguments.preset, Path(arguments.out), overrides=arguments.overrides, lengths=arguments.lengths,
                   batches=arguments.batches, repeats=arguments.repeats)


def import_(arguments: argparse.Namespace) -> None:
    from eso_jax import workdir
    from eso_jax.reference import import_checkpoint

    config, params = import_checkpoint(Path(arguments.src), arguments.config, arguments.family, arguments.alpha_0,
                                       arguments.start_id)
    workdir.create(Path(arguments.out), config, params)
    _say(f"{config.family.name}: {len(params)} tensors, {sum(x.size for x in params.values()):,} parameters, "
         f"in {arguments.out}")


def _check_out(out: str) -> None:
    """Before any long work: --out can be written."""
    path = Path(out).absolute()
    require(path.parent.is_dir(), "--out", out, f"the folder {str(path.parent)!r} does not exist")
    require(not path.is_dir(), "--out", out, "is a folder; give the name of a file")
    require(os.access(path if path.exists() else path.parent, os.W_OK), "--out", out, "cannot be written")


def _write_npz(path: str, **arrays: Any) -> None:
    import numpy as np

    with open(path, "wb") as file:  # np.savez would add .npz to a name
        np.savez(file, **arrays)
    _say(f"wrote {path}")


def _read_array(path: str, flag: str, key: str) -> Any:
    """The array of a .npy file, or the one called `key` of a .npz file."""
    import zipfile

    import numpy as np

    try:
        array = np.load(path)
        if isinstance(array, np.lib.npyio.NpzFile):
            array = array[key]
    except FileNotFoundError as error:
        raise EsoError(f"{flag} = {path!r}: no such file") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise EsoError(f"{flag} = {path!r}: not a readable .npy file, nor a .npz with {key!r}") from error
    return array


def read_plan(path: str) -> Any:
    """The plan in the .npz of eso-jax sample, or one with the same `order` and `tokens_per_step`."""
    import jax.numpy as jnp
    import numpy as np

    from eso_jax.order import check_permutations
    from eso_jax.sampling.plan import Plan

    order, counts = (_read_array(path, "--plan", key) for key in ("order", "tokens_per_step"))
    require(order.ndim == 2 and counts.ndim == 1 and np.issubdtype(counts.dtype, np.integer), "--plan", path,
            "must hold order, int [N, L], and tokens_per_step, int [steps]")
    check_permutations(order, order.shape[1])
    with np.load(path) as arrays:
        given = arrays["diffusion"] if "diffusion" in arrays else None
    require(given is None or given.shape == () and np.issubdtype(given.dtype, np.integer), "--plan", path,
            "its diffusion must be one integer")
    diffusion = None if given is None else int(given)
    return Plan(jnp.asarray(order, jnp.int32), counts, diffusion)


def _write_json(path: str | None, values: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
        _say(f"wrote {path}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be in [0, 2**32)")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eso-jax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, example: str, usage: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}", usage=usage)
        added.set_defaults(run=run)
        return added

    def model(added: argparse.ArgumentParser) -> None:
        added.add_argument("--workdir", required=True, help="a work directory, trained or imported")
        added.add_argument("--raw", action="store_true", help="use the raw parameters, not their moving average")
        added.add_argument("--seed", type=_seed, default=0, help="of all randomness (%(default)s)")
        added.add_argument("--alpha-0", type=float, help="share of tokens left to diffusion (the training value)")

    def precision(added: argparse.ArgumentParser) -> None:
        added.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                           help="of weights, products and cache (%(default)s)")

    added = command("train", train, "Train an experiment, or go on training it.",
                    "eso-jax train experiments/quickstart.py --workdir /tmp/w train.steps=100",
                    usage="%(prog)s [-h] experiment --workdir WORKDIR [section.field=value ...]")
    added.add_argument("experiment", help="a Python file that defines `config`, or a config.json")
    added.add_argument("--workdir", required=True, help="made, or resumed from if it holds this run")

    added = command("eval", evaluate, "The NELBO on held-out text, with its standard error.",
                    "eso-jax eval --workdir /tmp/w --alpha-0 0.25 --out eval.json")
    model(added)
    added.add_argument("--split", choices=["train", "validation", "test", "all"],
                       help="part of the text (validation; with --source, all)")
    added.add_argument("--source", help="other text than the training data's: a folder, a file or a glob")
    added.add_argument("--num-windows", type=int, default=512, help="windows, evenly spaced (%(default)s)")
    added.add_argument("--samples", type=int, default=1, help="Monte Carlo samples per window (%(default)s)")
    added.add_argument("--out", default="eval.json", help="JSON (%(default)s)")

    added = command("score", score, "Exact log-likelihood given orders, and the importance-weighted bound.",
                    "eso-jax score --workdir /tmp/w --tokens x.npy --num-orders 16 --alpha-0 0.25 --out s.npz")
    model(added)
    added.add_argument("--tokens", required=True, help=".npy, int [B, L], or the .npz of eso-jax sample")
    added.add_argument("--orders", help=".npy, int [K, B, L], or a .npz with orders; drawn if absent")
    added.add_argument("--num-orders", type=int, help="K, orders to draw per sequence (1)")
    added.add_argument("--plan", help=".npz of eso-jax sample: score along its plan by the sampler's own steps; "
                                      "writes logp [B] and logp_in_order [B, L]")
    added.add_argument("--out", required=True,
                       help=".npz with logp_per_order [K, B], iw_bound [B], iw_bound_standard_error [B], in nats")

    added = command("sample", sample, "Generate sequences.",
                    "eso-jax sample --workdir /tmp/w --num-samples 4 --steps 64 --alpha-0 0.25 --out samples.npz")
    model(added)
    added.add_argument("--num-samples", type=int, default=1, help="sequences (%(default)s)")
    added.add_argument("--steps", type=int, help="T, diffusion steps (128); plans of one token per step have none")
    added.add_argument("--top-p", type=float, default=1.0, help="nucleus mass; 1 keeps all (%(default)s)")
    added.add_argument("--min-p", type=float, default=0.0,
                       help="drop tokens less likely than this share of the likeliest (%(default)s)")
    added.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    added.add_argument("--plan", help=f"{', '.join(POLICIES)}; or the .npz of an earlier sample, to decode along its "
                                      "plan (the family's own: binomial, or left-to-right for AR)")
    added.add_argument("--num-tries", type=int, default=1,
                       help="draw samples of low entropy again, up to this often in all (%(default)s: keep them)")
    added.add_argument("--min-entropy", type=float, help="with --num-tries: nats of the last 256 tokens' unigrams "
                                                         "below which a sample is drawn again (BD3-LM's code: 4)")
    precision(added)
    added.add_argument("--tensor", type=int, default=1, help="devices to a copy of the model (%(default)s)")
    added.add_argument("--batch-size", type=int, default=64, help="sequences decoded together (%(default)s)")
    added.add_argument("--show", type=int, default=1, help="samples to print (%(default)s)")
    added.add_argument("--out", required=True, help=".npz with tokens [N, L], order [N, L], tokens_per_step, text")

    added = command("check-cache", check_cache,
                    "Prove that cached equals uncached, and any batch size another, on your model and machine.",
                    "eso-jax check-cache --workdir /tmp/w")
    model(added)
    added.add_argument("--rows", type=int, default=8, help="sequences (%(default)s)")
    precision(added)

    added = command("bench", bench, "Measure the samplers on random weights.",
                    "eso-jax bench sampling --preset cpu --out bench.json",
                    usage="%(prog)s [-h] sampling [model.field=value ...] --preset PRESET --out OUT [options]")
    added.add_argument("what", choices=["sampling"], help="what to measure")
    added.add_argument("--preset", required=True, choices=["cpu", "table11", "table13"],
                       help="cpu: 256 x 8 layers, L = 2048, float32; table11, table13: the paper's, for a GPU")
    added.add_argument("--lengths", type=int, nargs="+", help="instead of the preset's")
    added.add_argument("--batches", type=int, nargs="+", help="instead of the preset's")
    added.add_argument("--repeats", type=int, default=3, help="generations timed, for the median (%(default)s)")
    added.add_argument("--out", required=True, help=".json; a table (.md) and a picture (.png) are written beside it")

    added = command("import", import_, "Make a work directory from the authors' weights.",
                    "eso-jax import eso.safetensors --config sizes.json --out /tmp/w")
    added.add_argument("src", metavar="SRC", help="a .safetensors file")
    added.add_argument("--out", required=True, help="the new work directory; an existing one is refused")
    added.add_argument("--family", default="esolm", choices=FAMILIES,
                       help="what it was trained as (%(default)s)")
    added.add_argument("--config", help="JSON of the sizes: hidden_size, n_heads, n_blocks, cond_dim, length, "
                                        "vocab_size, mask_id, and block_size for BD3-LM")
    added.add_argument("--alpha-0", type=float, default=1.0, help="an Eso-LM's training value (%(default)s)")
    added.add_argument("--start-id", type=int, help="AR: the token it was trained to begin with (the mask)")
    return parser
