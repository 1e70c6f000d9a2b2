"""Tables 9 and 10: Eso-LM (B), "Eso-LM", against Eso-LM (A), whose clean tokens see each other, and MDLM.

Command:   python experiments/tables/tables_09_10_a_and_b.py --scale smoke
"""

from __future__ import annotations

import sys
from typing import Any

import bounds
from eso_jax.evaluation.diversity import Estimate
from lab import AS_ABOVE, NOTE_AS_ABOVE, RUNS, Cell, Lab, Table, main

ALPHAS = ("1", "0.5", "0.25", "0.125", "0.0625")
NUMBERS = {"lm1b": "Table 9", "owt": "Table 10"}


def run(lab: Lab) -> None:
    tables = {}
    for corpus, number in NUMBERS.items():
        rows: list[list[Cell]] = []
        for alpha_0 in ALPHAS:
            b, a = (f"{corpus}/{kind}_{alpha_0.replace('.', '')}" for kind in ("esolm", "esolm_a"))
            if b not in RUNS:
                continue
            nats_b, nats_a = (bounds.nelbo_per_window(lab, run) for run in (b, a))
            ours_b, ours_a = perplexity(lab, b), perplexity(lab, a)
            gap: Cell = AS_ABOVE if ours_b == ours_a == AS_ABOVE else bounds.mean(nats_b - nats_a)
            rows.append([alpha_0, RUNS[b].nelbo, ours_b, RUNS[a].nelbo, ours_a, gap])
        mdlm = f"{corpus}/mdlm"
        rows.append(["MDLM", RUNS[mdlm].nelbo, perplexity(lab, mdlm), None, None, None])
        columns = ["alpha_0", "(B), paper", "(B), ours", "(A), paper", "(A), ours",
                   "ours: (B) above (A), nats per token"]
        tables[f"{number}, {lab.heading(corpus)}"] = Table(columns, rows)
    notes = [NOTE_AS_ABOVE] if lab.smoke else []
    lab.report("tables_09_10_a_and_b", __doc__ or "", tables, notes, lambda figure: draw(figure, tables))


def perplexity(lab: Lab, run: str) -> Cell:
    return AS_ABOVE if lab.is_as_above(run) else bounds.perplexity_of(bounds.nelbo_per_window(lab, run))


def draw(figure: Any, tables: dict[str, Table]) -> None:
    axes = figure.subplots(1, 2)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        *rows, mdlm = table.rows
        for column, style in ((1, "C0o--"), (2, "C0s-"), (3, "C1o--"), (4, "C1s-")):
            points = [(float(str(row[0])), cell.value if isinstance(cell, Estimate) else cell)
                      for row in rows if (cell := row[column]) != AS_ABOVE]
            ax.plot(*zip(*points, strict=True), style, label=table.columns[column])
        ax.axhline(mdlm[1], color="grey", linestyle="--", label="MDLM, paper")
        if isinstance(mdlm[2], Estimate):
            ax.axhline(mdlm[2].value, color="grey", label="MDLM, ours")
        ax.set_title(title, fontsize=8)
        ax.set(xscale="log", yscale="log", xlabel="alpha_0", ylabel="test perplexity (NELBO)")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
