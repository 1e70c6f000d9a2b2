"""Figures 20 and 21: the block sampler (appendix E.10), whose steps decode tokens far apart, and the binomial plan.

Command:   python experiments/tables/figures_20_21_block_sampler.py --scale smoke

The paper's figures have no numbers. The model is the Eso-LM of alpha_0 = 1; a plan of parallelism k decodes k tokens in
each step. The paper finds the block sampler better where k is large.
"""

from __future__ import annotations

import sys

import samples
from lab import Cell, Lab, Table, main
from samples import PAPER_LENGTH, Measures, Setting

PARALLELISM = (64, 32, 16, 8, 4, 2, 1)  # at the paper's length of 1024
PLANS = {"binomial": None, "block, groups ascending": "strided",
         "block, shuffled for the batch": "strided-shared", "block, shuffled for each row": "strided-row"}


def run(lab: Lab) -> None:
    points: dict[str, list[Measures]] = {}
    rows: list[list[Cell]] = []
    for name, plan in PLANS.items():
        points[name] = []
        for parallelism in PARALLELISM:
            measures = samples.measure(lab, "owt/esolm_1", Setting(PAPER_LENGTH // parallelism, 1.0, plan))
            points[name].append(measures)
            rows.append([name, measures.steps, measures.nfe, measures.seconds, measures.gen_ppl, measures.entropy,
                         measures.mauve, measures.repetition])
    columns = ["plan", "T", "NFE", "s", "Gen PPL", "entropy", "MAUVE", "repeated 4-grams"]
    lab.report("figures_20_21_block_sampler", __doc__ or "", {"": Table(columns, rows)},
               draw=samples.picture_of(points))


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
