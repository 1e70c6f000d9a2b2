"""Does a run fit a TPU slice, and how fast could it be? Compiled here, without one."""

from __future__ import annotations

import argparse

from eso_jax.console import say
from eso_jax.files import as_json, check_out, write_whole

EXAMPLE = "eso-jax plan experiments/scale/esolm_1b.py --topology v5p:8x8x8 --out plan.json train.remat=dots"
USAGE = "%(prog)s [-h] experiment --topology TOPOLOGY [options] [section.field=value ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="FILE.py, FILE.py:RUN, a config.json, or quickstart")
    parser.add_argument("--topology", required=True, help="v5p:8x8x8, v5e:2x4, v6e:16x16, ...; an accelerator type of "
                        "the cloud (v5p-1024, v5litepod-8); h100:8 for GPUs")
    parser.add_argument("--tensor", type=int, default=1, help="devices to a copy of the model when sampling; doubled "
                        "until it fits (%(default)s)")
    parser.add_argument("--sample-batch", type=int, default=16, help="sequences that each copy decodes together "
                        "(%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampler (%(default)s: off)")
    parser.add_argument("--target-config", help="GPUs other than H100 and H200: XLA's description of one, a .txtpb")
    parser.add_argument("--out", help="the plan as JSON")


def run(arguments: argparse.Namespace) -> None:
    from eso_jax import chips
    from eso_jax import config as configs
    from eso_jax.aot import plan, target
    from eso_jax.data import override
    from eso_jax.decoding.categorical import Rule
    from eso_jax.errors import require

    if arguments.out:
        check_out(arguments.out)
    require(arguments.sample_batch >= 1, "--sample-batch", arguments.sample_batch, "must be at least 1")
    topology = chips.topology(arguments.topology)
    target.prepare(topology)  # before the experiment's file is run, which may use JAX
    config = override(configs.from_file(arguments.experiment), *arguments.overrides)
    found = plan(config, topology, say, arguments.tensor, arguments.sample_batch, Rule(top_p=arguments.top_p),
                 arguments.target_config)
    if arguments.out:
        written = {"experiment": arguments.experiment, "overrides": arguments.overrides, **found}
        write_whole(arguments.out, as_json(written))
        say(f"wrote {arguments.out}")
