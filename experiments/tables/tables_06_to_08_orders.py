"""Tables 6 to 8: importance-weighted bounds against the number K of orders.

Command:   python experiments/tables/tables_06_to_08_orders.py --scale smoke

For an Eso-LM the bound from one order is worse than the NELBO (the paper's tables show it, and eq. 9 would have them
equal). The reason is who sees whom: in the pass behind the NELBO a masked token also sees the masked tokens before it,
in the pass behind this bound it sees clean tokens and itself. For MDLM both use one and the same view, and so the two
agree but for the spread of the orders. The last columns put numbers to it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import bounds
from lab import Cell, Lab, Table, main

COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "smoke": {"lm1b": (1, 2, 4, 10, 20, 64), "owt": (1, 2, 4, 10, 20, 64)},
    "paper": {"lm1b": (1, 10, 20, 50, 100, 1000, 5000), "owt": (1, 10, 20, 50, 100, 1000)}}
WINDOWS = {"smoke": 128, "paper": 1024}
MDLM_COUNTS: dict[str, tuple[int, ...]] = {
    "smoke": (1, 2, 4, 10, 16), "paper": (1, 10, 20, 50, 100, 1000)}
CORPORA: dict[str, tuple[str, tuple[str, ...]]] = {
    "lm1b": ("LM1B", ("mdlm", "esolm_1", "esolm_05", "esolm_025", "esolm_0125", "esolm_00625")),
    "owt": ("OpenWebText", ("esolm_1", "esolm_05", "esolm_025", "esolm_0125"))}
PAPER = {
    "lm1b": {"mdlm": {1: 31.19, 10: 28.66, 20: 28.26, 50: 27.85, 100: 27.57, 1000: 26.82},
             "esolm_1": {1: 37.53, 10: 34.49, 20: 33.94, 50: 33.37, 100: 33.00, 1000: 32.09, 5000: 31.65},
             "esolm_05": {1: 33.55, 10: 30.69, 20: 30.18, 50: 29.64, 100: 29.31, 1000: 28.48, 5000: 28.07},
             "esolm_025": {1: 29.64, 10: 27.00, 20: 26.56, 50: 26.08, 100: 25.79, 1000: 25.11, 5000: 24.80},
             "esolm_0125": {1: 26.94, 10: 24.54, 20: 24.18, 50: 23.84, 100: 23.64, 1000: 23.19, 5000: 23.02},
             "esolm_00625": {1: 25.25, 10: 23.30, 20: 23.05, 50: 22.84, 100: 22.72, 1000: 22.48, 5000: 22.39}},
    "owt": {"esolm_1": {1: 31.71, 10: 30.50, 20: 30.26, 50: 29.99, 100: 29.80, 1000: 29.31},
            "esolm_05": {1: 28.95, 10: 27.77, 20: 27.53, 50: 27.27, 100: 27.09, 1000: 26.61},
            "esolm_025": {1: 25.23, 10: 24.16, 20: 23.95, 50: 23.72, 100: 23.56, 1000: 23.15},
            "esolm_0125": {1: 22.24, 10: 21.35, 20: 21.17, 50: 20.98, 100: 20.86, 1000: 20.53}}}
PAPER_NELBO = {"lm1b": {"mdlm": 31.78, "esolm_1": 36.12, "esolm_05": 32.53, "esolm_025": 29.23, "esolm_0125": 26.29,
                        "esolm_00625": 24.53},
               "owt": {"esolm_1": 30.06, "esolm_05": 27.94, "esolm_025": 24.71, "esolm_0125": 21.92}}
NAMES = {"mdlm": "MDLM", "esolm_1": "alpha_0 = 1", "esolm_05": "alpha_0 = 0.5", "esolm_025": "alpha_0 = 0.25",
         "esolm_0125": "alpha_0 = 0.125", "esolm_00625": "alpha_0 = 0.0625"}


def run(lab: Lab) -> None:
    tables, curves = {}, {}
    for corpus, (title, runs) in CORPORA.items():
        counts = COUNTS[lab.scale][corpus]
        rows: list[list[Cell]] = []
        for name in runs:
            found = by_count(lab, corpus, name)
            nelbo = bounds.nelbo_per_window(lab, f"{corpus}/{name}", WINDOWS[lab.scale], samples=16)
            paper = PAPER[corpus][name]
            gap = bounds.mean(found[1] - nelbo)
            rows.append([f"{NAMES[name]}, paper", *(paper.get(k) for k in counts), PAPER_NELBO[corpus][name],
                         float(np.log(paper[1] / PAPER_NELBO[corpus][name]))])
            rows.append([f"{NAMES[name]}, ours", *(bounds.perplexity_of(found[k]) if k in found else None
                                                   for k in counts), bounds.perplexity_of(nelbo), gap])
            curves[title, name] = found
        tables[f"{title}: test perplexity"] = Table(
            ["model", *(f"K = {k}" for k in counts), "NELBO", "K = 1 above NELBO, nats per token"], rows)
    lab.report("tables_06_to_08_orders", __doc__ or "", tables,
               [f"Ours are of {WINDOWS[lab.scale]} test windows, each with orders of its own (the paper's batches of "
                "32 share one), the NELBO of 16 draws each."], lambda figure: draw(figure, curves))


def by_count(lab: Lab, corpus: str, name: str) -> dict[int, np.ndarray]:
    """The bound of each window in nats per token from the first K orders, by K."""
    counts = (MDLM_COUNTS[lab.scale] if name == "mdlm" else COUNTS[lab.scale][corpus])
    run = f"{corpus}/{name}"
    logp = bounds.log_prob(lab, run, max(counts), WINDOWS[lab.scale])
    return {k: bounds.bound_per_window(logp[:k], lab.config(run).model.length) for k in counts}


def draw(figure: Any, curves: dict[tuple[str, str], dict[int, np.ndarray]]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, runs) in zip(axes, CORPORA.values(), strict=True):
        for name in runs:
            found = {k: bounds.perplexity_of(nats) for k, nats in curves[title, name].items()}
            ax.errorbar(list(found), [e.value for e in found.values()], [e.standard_error for e in found.values()],
                        fmt="o-", label=NAMES[name])
        ax.set(xscale="log", xlabel="K, orders", ylabel="test perplexity, at most", title=f"ours, {title}")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
