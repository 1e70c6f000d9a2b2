"""Table 4: the share kappa of each batch that is given to the diffusion loss (Eso-LM (A), LM1B, half the steps).

Command:   python experiments/tables/table_04_kappa.py --scale smoke

The paper's runs with kappa = 0.25 and 0.125 diverged.
"""

from __future__ import annotations

import sys
from typing import Any

import bounds
from eso_jax.evaluation.diversity import Estimate
from lab import RUNS, Cell, Lab, Table, main

ALPHAS, KAPPAS = ("0.5", "0.25", "0.125", "0.0625"), ("0.75", "0.5", "0.25", "0.125")


def run(lab: Lab) -> None:
    ours = {(alpha_0, kappa): bounds.perplexity_of(bounds.nelbo_per_window(lab, name(alpha_0, kappa)))
            for alpha_0 in ALPHAS for kappa in KAPPAS}
    columns = ["alpha_0", *(f"{whose}, kappa = {kappa}" for kappa in KAPPAS for whose in ("paper", "ours"))]
    rows: list[list[Cell]] = []
    for alpha_0 in ALPHAS:
        cells: list[Cell] = [alpha_0]
        for kappa in KAPPAS:
            paper = RUNS[name(alpha_0, kappa)]
            cells += ["diverged" if paper.diverged else paper.nelbo, ours[alpha_0, kappa]]
        rows.append(cells)
    lab.report("table_04_kappa", __doc__ or "", {"Test perplexity (NELBO)": Table(columns, rows)},
               draw=lambda figure: draw(figure, ours))


def name(alpha_0: str, kappa: str) -> str:
    return f"lm1b/kappa_{kappa.replace('.', '')}_esolm_a_{alpha_0.replace('.', '')}"


def draw(figure: Any, ours: dict[tuple[str, str], Estimate]) -> None:
    left, right = figure.subplots(1, 2)
    for alpha_0 in ALPHAS:
        kappas = [kappa for kappa in KAPPAS if not RUNS[name(alpha_0, kappa)].diverged]
        paper = [RUNS[name(alpha_0, kappa)].nelbo for kappa in kappas]
        left.plot([float(k) for k in kappas], paper, "o-", label=f"alpha_0 = {alpha_0}")
        values = [ours[alpha_0, kappa] for kappa in KAPPAS]
        right.errorbar([float(k) for k in KAPPAS], [v.value for v in values], [v.standard_error for v in values],
                       fmt="o-", label=f"alpha_0 = {alpha_0}")
    for axes, title in ((left, "paper, LM1B"), (right, "ours")):
        axes.set(xlabel="kappa", ylabel="test perplexity (NELBO)", title=title, xlim=(0, 0.9))
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
