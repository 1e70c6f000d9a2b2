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
from eso_jax.evaluation.diversity import Estimate
from lab import AS_ABOVE, NOTE_AS_ABOVE, RUNS, Cell, Lab, Table, main

COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "smoke": {"lm1b": (1, 2, 4, 10, 20, 64), "owt": (1, 2, 4, 10, 20, 64)},
    "paper": {"lm1b": (1, 10, 20, 50, 100, 1000, 5000), "owt": (1, 10, 20, 50, 100, 1000)}}
WINDOWS = {"smoke": 128, "paper": 1024}
MDLM_COUNTS: dict[str, tuple[int, ...]] = {
    "smoke": (1, 2, 4, 10, 16), "paper": (1, 10, 20, 50, 100, 1000)}
CORPORA: dict[str, tuple[str, ...]] = {
    "lm1b": ("mdlm", "esolm_1", "esolm_05", "esolm_025", "esolm_0125", "esolm_00625"),
    "owt": ("esolm_1", "esolm_05", "esolm_025", "esolm_0125")}
NAMES = {"mdlm": "MDLM", "esolm_1": "alpha_0 = 1", "esolm_05": "alpha_0 = 0.5", "esolm_025": "alpha_0 = 0.25",
         "esolm_0125": "alpha_0 = 0.125", "esolm_00625": "alpha_0 = 0.0625"}


def run(lab: Lab) -> None:
    tables = {}
    for corpus, runs in CORPORA.items():
        counts = COUNTS[lab.scale][corpus]
        rows: list[list[Cell]] = []
        for name in runs:
            run = f"{corpus}/{name}"
            paper, nelbo = RUNS[run].orders, RUNS[run].nelbo
            assert nelbo is not None
            rows.append([f"{NAMES[name]}, paper", *(paper.get(k) for k in counts), nelbo,
                         float(np.log(paper[1] / nelbo))])
            if lab.is_as_above(run):
                rows.append([f"{NAMES[name]}, ours", *[AS_ABOVE] * (len(counts) + 2)])
                continue
            found = by_count(lab, corpus, name)
            ours = bounds.nelbo_per_window(lab, run, WINDOWS[lab.scale], samples=16)
            gap = bounds.mean(found[1] - ours)
            rows.append([f"{NAMES[name]}, ours", *(bounds.perplexity_of(found[k]) if k in found else None
                                                   for k in counts), bounds.perplexity_of(ours), gap])
        tables[f"{lab.heading(corpus)}: test perplexity"] = Table(
            ["model", *(f"K = {k}" for k in counts), "NELBO", "K = 1 above NELBO, nats per token"], rows)
    notes = [f"Ours are of {WINDOWS[lab.scale]} test windows, each with orders of its own (the paper's batches of 32 "
             "share one), the NELBO of 16 draws each."]
    if lab.smoke:
        notes.append(NOTE_AS_ABOVE)
    lab.report("tables_06_to_08_orders", __doc__ or "", tables, notes, lambda figure: draw(figure, tables))


def by_count(lab: Lab, corpus: str, name: str) -> dict[int, np.ndarray]:
    """The bound of each window in nats per token from the first K orders, by K."""
    counts = (MDLM_COUNTS[lab.scale] if name == "mdlm" else COUNTS[lab.scale][corpus])
    run = f"{corpus}/{name}"
    logp = bounds.log_prob(lab, run, max(counts), WINDOWS[lab.scale])
    return {k: bounds.bound_per_window(logp[:k], lab.config(run).model.length) for k in counts}


def draw(figure: Any, tables: dict[str, Table]) -> None:
    """Ours."""
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        counts = [int(column.removeprefix("K = ")) for column in table.columns[1:-2]]
        for row in table.rows:
            name, *cells = row[:-2]
            points = [(k, cell) for k, cell in zip(counts, cells, strict=True) if isinstance(cell, Estimate)]
            if points:  # not the paper's, nor one that stands above
                ax.errorbar([k for k, _ in points], [e.value for _, e in points],
                            [e.standard_error for _, e in points], fmt="o-", label=name)
        ax.set_title(title, fontsize=8)
        ax.set(xscale="log", xlabel="K, orders", ylabel="test perplexity, at most")
        ax.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
