"""Table 3 and Figure 5: what it does to the numbers to draw degenerate samples again.

Command:   python experiments/tables/table_03_num_tries.py --scale smoke

BD3-LM's code draws a sample again, up to ten times, while the entropy of its last 256 tokens is below 4 nats. The paper
measures what that does, on public checkpoints of 1M steps. Nobody redraws here unless asked.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import samples
from eso_jax.decoding.rejection import unigram_entropy
from lab import RUNS, Cell, Lab, Table, main
from samples import Setting

SAMPLERS = {"BD3-LM, L' = 16": "owt/bd3lm_16", "MDLM": "owt/mdlm", "AR": "owt/ar"}
ENTROPY, TRIES = 4, 10
QUANTILE = 0.1  # of the entropies of the samples drawn once, at smoke scale, where 4 nats of bytes mean nothing


def run(lab: Lab) -> None:
    rows: list[list[Cell]] = []
    settings = [(sampler, name, steps) for sampler, name in SAMPLERS.items() for steps in RUNS[name].redraws]
    for sampler, name, steps in settings:
        once, tries = RUNS[name].redraws[steps]
        first = samples.measure(lab, name, Setting(steps))
        bound = threshold(lab, name, Setting(steps))
        again = samples.measure(lab, name, Setting(steps, num_tries=TRIES, min_entropy=bound))
        rows.append([sampler, steps, once[0], first.gen_ppl, once[1], first.entropy, tries[0], again.gen_ppl, tries[1],
                     again.entropy, bound, again.redrawn])
    columns = ["sampler", "T", *(f"{what}, {n}, {whose}" for n in ("one try", "ten") for what in ("Gen PPL", "entropy")
                                 for whose in ("paper", "ours")), "redrawn below, nats", "of our samples, redrawn"]
    lab.report("table_03_num_tries", __doc__ or "", {"": Table(columns, rows)},
               [f"Of {samples.COUNT[lab.scale]} samples each. T is the paper's, at its length of 1024. The paper's "
                "models had 1M steps; ours are those of the other tables."], lambda figure: draw(figure, rows))


def threshold(lab: Lab, name: str, setting: Setting) -> float:
    if not lab.smoke:
        return float(ENTROPY)
    with np.load(samples.path_of(lab, name, setting)) as arrays:
        return float(np.quantile(unigram_entropy(arrays["tokens"]), QUANTILE))


def draw(figure: Any, rows: list[list[Cell]]) -> None:
    axes = figure.subplots(1, 2)
    for ax, offset, title in ((axes[0], 2, "paper"), (axes[1], 3, "ours")):
        for row in rows:
            pairs = [(samples.value_of(row[offset + shift + 2]), samples.value_of(row[offset + shift]))
                     for shift in (0, 4)]
            ax.plot(*zip(*pairs, strict=True), "-", color="grey", linewidth=1)
            ax.plot(*pairs[0], "o", color="C0")
            ax.plot(*pairs[1], "s", color="C1")
            ax.annotate(f"{row[0]}, T = {row[1]}", pairs[0], fontsize=7)
        ax.set(xlabel="entropy, nats", ylabel="Gen PPL", yscale="log", title=f"{title}: circles one try, squares ten")


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
