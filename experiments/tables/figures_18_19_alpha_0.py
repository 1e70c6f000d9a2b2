"""Figures 18 and 19: one model, trained at alpha_0 = 1 and sampled at every alpha_0, against a model for each.

Command:   python experiments/tables/figures_18_19_alpha_0.py --scale smoke

The paper's figures have no numbers of their own; they are of the samples of Table 13, and so are these. Its Remark 2:
the frontier of the one model is nearly as good.
"""

from __future__ import annotations

import sys

import samples
from lab import Cell, Lab, Table, main
from samples import Measures, Setting
from tables_13_to_15_quality import ESO_LM, TRAINED

from eso_jax.evaluation.frontier import frontier


def run(lab: Lab) -> None:
    points: dict[str, list[Measures]] = {"trained at 1": [], "trained at each": []}
    for trained, name in TRAINED.items():
        measured = [samples.measure(lab, name, Setting(steps, alpha_0)) for alpha_0, steps in ESO_LM]
        points["trained at each"] += measured
        if trained == "1":
            points["trained at 1"] += measured
    tables = {}
    for title, pick, lower in (("Gen PPL, best so far", lambda measures: measures.gen_ppl.value, True),
                               ("MAUVE, best so far", lambda measures: measures.mauve.value, False)):
        rows: list[list[Cell]] = []
        for name, measured in points.items():
            best = frontier([(measures.seconds, pick(measures)) for measures in measured], lower)
            rows += [[name, seconds, value] for seconds, value in best]
        tables[title] = Table(["models", "s", title], rows)
    lab.report("figures_18_19_alpha_0", __doc__ or "", tables, draw=samples.picture_of(points))


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
