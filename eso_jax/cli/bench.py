"""Measure the samplers, or the training step, on random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from eso_jax.config import ATTENTION, SIZES
from eso_jax.files import check_out

EXAMPLE = "eso-jax bench sampling --preset laptop --out bench.json"
TRAINING = "eso-jax bench training --families esolm,mdlm --alpha-0 0.5 --length 1024 --out training.json"
USAGE = "%(prog)s [-h] {sampling,training} [model.field=value ...] --out OUT [options]"
FORMULAS = """
step_seconds    median over the steps, from the end of one to the end of the next (their quartiles: quartiles)
tokens_per_s    batch x L / step_seconds, over all devices
compile_seconds tracing and compiling, or loading what an earlier run compiled
model_flops     products of a step, forward and twice that backward, as the code executes it: every pair of a query and
                a key, logits of the tokens for which there is room (eso_jax/flops.py)
needed_flops    the same of what the loss depends on: pairs of a query and a key that it sees, logits of tokens with a
                loss, no z_0 copy of a clean token; expected over the draws
executed_flops  products in the compiled program, a loop's as often as it runs, of a conditional the smaller branch;
                attention of cuDNN and splash by 4 K, backward 10 K, for each pair (eso_jax/aot/hlo.py); all devices
                together
mfu             model_flops / step_seconds / (the chips' bfloat16 peak, eso_jax/chips.py); null where none is known
peak_bytes      of one device: what goes in (it is reused for what comes out) and temporaries, by the compiler
attention       the backends that compute it
"""
WAIT = "after compiling, wait for this file: so several commands compile together and are timed one by one"
OUT = ".json; a table (.md) and a picture (.png) are written beside it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"example: {TRAINING}\n{parser.epilog}"
    parts = parser.add_subparsers(required=True, metavar="sampling | training", dest="what", prog=parser.prog)

    sampling = parts.add_parser("sampling", help="the samplers, and the machine's floor",
                                usage="%(prog)s [-h] --preset PRESET --out OUT [options] [model.field=value ...]",
                                epilog=f"example: {EXAMPLE}")
    sampling.add_argument("--preset", required=True, choices=["laptop", "cpu", "table11", "table13"],
                          help="laptop, cpu: 256 x 8 layers, float32, L = 512 or 2048; table11, table13: the paper's, "
                          "for a GPU")
    sampling.add_argument("--lengths", type=int, nargs="+", help="instead of the preset's")
    sampling.add_argument("--batches", type=int, nargs="+", help="instead of the preset's")
    sampling.add_argument("--samplers", nargs="+", metavar="NAME", help="of the preset, by the names in its table "
                          "(all)")
    sampling.add_argument("--attention", nargs="+", choices=ATTENTION, default=["auto"], help="what computes it, one "
                          "beside the other; plain turns the kernels for a cache off as well (auto)")
    sampling.add_argument("--passes", type=int, help="time so many in the middle of each plan, and scale up")
    sampling.add_argument("--repeats", type=int, default=3, help="generations timed, for the median (%(default)s)")
    sampling.add_argument("--wait-for", type=Path, metavar="FILE", help=WAIT)
    sampling.add_argument("--out", required=True, help=OUT)

    training = parts.add_parser("training", help="the training step: speed, work, memory",
                                usage="%(prog)s [-h] --out OUT [options] [model.field=value train.field=value ...]",
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog=f"--out has, of each family:\n{FORMULAS}\nexample: {TRAINING}")
    training.add_argument("--families", default="esolm,mdlm,bd3lm,ar", help="with commas (%(default)s)")
    training.add_argument("--alpha-0", type=float, nargs="+", default=[1.0], help="of Eso-LMs; one or more (1)")
    training.add_argument("--size", choices=list(SIZES), default="small", help="of the model (%(default)s)")
    training.add_argument("--length", type=int, default=1024, help="tokens of a sequence (%(default)s)")
    training.add_argument("--batch", type=int, default=32, help="sequences of a step, over all devices (%(default)s)")
    training.add_argument("--steps", type=int, default=20, help="steps timed, behind three that are not; 0: compile "
                          "and count only (%(default)s)")
    training.add_argument("--wait-for", type=Path, metavar="FILE", help=WAIT)
    training.add_argument("--out", required=True, help=OUT)


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments.out)
    out, overrides = Path(arguments.out), arguments.overrides
    if arguments.what == "training":
        from eso_jax.evaluation import training_speed

        training_speed.run(arguments.families.split(","), out, arguments.size, arguments.length, arguments.batch,
                           arguments.steps, arguments.alpha_0, overrides, arguments.wait_for)
    else:
        from eso_jax.evaluation import throughput

        throughput.run(arguments.preset, out, overrides=overrides, lengths=arguments.lengths,
                       batches=arguments.batches, repeats=arguments.repeats, samplers=arguments.samplers,
                       attention=arguments.attention, few_passes=arguments.passes, turn=arguments.wait_for)
