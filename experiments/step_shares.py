"""Which part of a training step takes how much of its time, by a profile of one step on this machine.

Command:   python experiments/step_shares.py --batch 64 --out shares.json [model.field=value train.field=value ...]

The step is that of `eso-jax bench training`. A kernel counts for the scope that it was traced in: attention (rotations
included; products with its weights are the layers'), head and loss, the rest of the layers, and what has no gradient:
optimizer, averages, draws. Kernels that the profiler gives no name of the program are "unknown".
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.profiler
import numpy as np

from eso_jax import sharding
from eso_jax.aot import hlo
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.config import SIZES
from eso_jax.console import say
from eso_jax.evaluation.throughput import describe_machine
from eso_jax.evaluation.training_speed import configs_of
from eso_jax.files import as_json, check_out, write_whole
from eso_jax.run import train
from eso_jax.run.timing import wait_for


def part_of(op_name: str) -> str:
    """The part of a step that an operation belongs to, by the scopes in its name."""
    if "attention" in op_name:
        return "attention"
    if re.search(r"\b(head|loss)\b", op_name):
        return "head and loss"
    return "layers" if "jvp" in op_name else "optimizer and draws"


def parts_of(program: str) -> dict[str, str]:
    """Of a compiled program: the part of each of its operations."""
    computations, _ = hlo.parse(program)
    names = {op.name: re.search(r'op_name="([^"]*)"', op.attributes)
             for computation in computations.values() for op in computation.instructions.values()}
    return {name: part_of(found[1]) for name, found in names.items() if found}


def seconds_of(trace: Path, parts: dict[str, str]) -> dict[str, float]:
    """Seconds of each part in a profile: of kernels on GPUs, elsewhere of the threads that ran operations."""
    total: Counter[str] = Counter()
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                kernels = "GPU" in plane.name and (line.name or "").startswith("Stream")
                for event in line.events:
                    op = str(dict(event.stats).get("hlo_op", ""))
                    if kernels or op in parts:
                        total[parts.get(op, "unknown")] += event.duration_ns / 1e9
    return dict(total.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="ar,mdlm,esolm", help="with commas (%(default)s)")
    parser.add_argument("--alpha-0", type=float, default=1 / 2, help="of Eso-LMs (%(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model (%(default)s)")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--wait-for", type=Path, metavar="FILE", help="once it is compiled, until there is such a file")
    parser.add_argument("--out", type=Path, required=True, help=".json")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    check_out(arguments.out)
    found: dict[str, dict[str, float]] = {}
    for config in configs_of(arguments.families.split(","), arguments.size, arguments.length, arguments.batch,
                             [arguments.alpha_0], arguments.overrides):
        mesh, size = sharding.mesh(config.mesh), config.train.batch_size
        rows = np.zeros((len(sharding.rows_of_process(mesh, size)), config.model.length), np.int32)
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            step = train.lower_step(config, mesh).compile()
            wait_for(arguments.wait_for)
            tokens = sharding.put_rows(rows, mesh, size)
            state, _ = step(train.begin(config, mesh), tokens)
            state = jax.block_until_ready(step(state, tokens))[0]
            with jax.profiler.trace(folder):
                jax.block_until_ready(step(state, tokens))
            seconds = seconds_of(Path(folder), parts_of(step.as_text() or ""))
        found[config.family.name] = seconds
        say(f"{config.family.name}, batch {size}: {1e3 * sum(seconds.values()):.1f} ms in kernels: " + ", ".join(
            f"{part} {value / sum(seconds.values()):.1%}" for part, value in seconds.items()))
        write_whole(arguments.out, as_json({"machine": describe_machine(), "batch": size, "seconds": found}))


if __name__ == "__main__":
    keep_compilations()
    raise SystemExit(exit_code_of(main))
