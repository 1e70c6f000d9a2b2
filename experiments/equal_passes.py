"""Does an entropy budget lose less than a fixed plan of as many passes?

Command:   python experiments/equal_passes.py WORKDIR [WORKDIR ...] --out runs/equal_passes.json
           (a picture beside it; Eso-LMs (B), as fewer_passes.py trains them: one for each seed)

Of each model and budget, samples by `entropy:G`, and as many along fixed plans with as many passes on average:

  even       the paper's T steps, of equal widths
  binomial   the paper's T steps, of widths that each row draws for itself
  mean       the widths that the budget has found, averaged over samples: what is left is what each row adapts

All have the same random orders and the same uniforms, row by row, so that differences are paired. `lost`, in bits per
token, is what it is in fewer_passes.py.

Axes: N samples, L length, S steps.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eso_jax import load
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.console import say
from eso_jax.decoding.plan import Plan, expected_nfe
from eso_jax.engine.model import Model, Samples
from eso_jax.evaluation.diversity import mean
from eso_jax.evaluation.picture import COLOURS, picture
from eso_jax.files import as_json, check_out, write_whole
from fewer_passes import BITS, WIDE, log_p

BUDGETS = (4, 8, 16)  # nats


def lost(model: Model, samples: Samples) -> np.ndarray:
    """Of each sample, in bits per token, [N]."""
    length = samples.tokens.shape[1]
    own, law = (log_p(model, samples.tokens, samples.order, first)
                for first in (np.arange(length)[None], samples.plan.step_begins))
    return (law - own) * BITS / length


def widths_of(found: Samples, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Steps of fixed plans with about as many passes as samples have taken: [S], or [N, S]."""
    (count, length), passes = found.tokens.shape, float(found.passes.mean())
    steps = min(range(1, 16 * length), key=lambda steps: abs(expected_nfe(length, steps, 1.0) - passes))
    drawn = [np.bincount(rng.integers(steps, size=length)) for _ in range(count)]
    drawn = [row[row > 0] for row in drawn]
    until = np.cumsum(np.broadcast_to(found.tokens_per_pass, (count, found.tokens_per_pass.shape[-1])), axis=1)
    # The slot that a row has reached at each of as many parts of its own passes, averaged over rows.
    parts = round(passes)
    reached = np.mean([np.interp(np.arange(parts + 1) / parts * own, np.arange(own + 1), [0, *row[:own]])
                       for row, own in zip(until, found.passes, strict=True)], axis=0)
    widths = np.diff(np.maximum.accumulate(np.maximum(np.round(reached), np.arange(parts + 1)))).astype(int)
    return {"even": np.diff(np.arange(parts + 1) * length // parts),
            "binomial": np.stack([np.pad(row, (0, max(map(len, drawn)) - len(row))) for row in drawn]),
            "mean": widths[widths > 0]}


def compare(model: Model, count: int) -> list[dict[str, Any]]:
    """What each budget and the plans beside it lose, and the difference: plan less budget."""
    rng, length, rows = np.random.default_rng(0), model.config.model.length, []
    order = jnp.asarray(rng.permuted(np.tile(np.arange(length), (count, 1)), axis=1), jnp.int32)
    draw = functools.partial(model.sample, count, batch_size=WIDE)
    for budget in BUDGETS:
        found = draw(plan=Plan(order, np.ones(length, int)), decoder=f"entropy:{budget}")
        own, passes, plans = lost(model, found), float(found.passes.mean()), {}
        for name, widths in widths_of(found, rng).items():
            theirs = lost(model, draw(plan=Plan(order, widths)))
            plans[name] = {"passes": float((np.atleast_2d(widths) > 0).sum(1).mean()), "lost": mean(theirs).to_json(),
                           "more": mean(theirs - own).to_json()}
            say(f"entropy:{budget}, {passes:.1f} passes: {mean(own)} bits lost; {name}, "
                f"{plans[name]['passes']:.1f} passes: {mean(theirs - own)} more")
        rows.append({"budget": budget, "passes": passes, "lost": mean(own).to_json(), "plans": plans})
    return rows


def draw(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """What plans lose beyond the budget, by passes; a panel for each model."""
    with picture(path, 4.5 * len(found), 4.2) as figure:
        for axes, (name, rows) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(),
                                      strict=True):
            for number, (plan, colour) in enumerate(zip(rows[0]["plans"], COLOURS, strict=False)):
                more = [row["plans"][plan]["more"] for row in rows]
                axes.errorbar([row["passes"] * 1.02**(number - 1) for row in rows], [each["value"] for each in more],
                              [2 * each["standard_error"] for each in more], color=colour, marker="o", label=plan)
            axes.axhline(0, color="k", linestyle="--", linewidth=1)
            axes.set(xscale="log", xlabel="passes of a sample", title=name)
            axes.minorticks_off()
            axes.set_xticks([row["passes"] for row in rows], [f"{row['passes']:.0f}" for row in rows])
            axes.legend(title="fixed plan")
        figure.supylabel("bits per token lost beyond the entropy budget (2 errors)", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument("--samples", type=int, default=256, help="of each setting (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help=".json; a picture beside it")
    arguments = parser.parse_args()
    check_out(arguments.out)
    found = {}
    for workdir in arguments.workdirs:
        found[workdir.name] = compare(load(workdir), arguments.samples)
        write_whole(arguments.out, as_json({"samples": arguments.samples, "models": found}))
    draw(arguments.out.with_suffix(".png"), found)
    say(f"wrote {arguments.out}")


if __name__ == "__main__":
    keep_compilations()
    raise SystemExit(exit_code_of(main))
