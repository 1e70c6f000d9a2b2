"""Tables 9 and 10: Eso-LM (B), "Eso-LM", against Eso-LM (A), whose clean tokens see each other, and MDLM.

Command:   python experiments/tables/tables_09_10_a_and_b.py --scale smoke
"""

from __future__ import annotations

import sys
from typing import Any

import bounds
from eso_jax.evaluation.diversity import Estimate
from lab import Cell, Lab, Table, main

# alpha_0: (B) and (A) of the paper, test perplexity (NELBO).
PAPER = {"lm1b": {"1": (36.12, 30.96), "0.5": (32.53, 30.51), "0.25": (29.23, 28.44), "0.125": (26.29, 25.97),
                  "0.0625": (24.53, 24.51)},
         "owt": {"1": (30.06, 26.21), "0.5": (27.94, 25.38), "0.25": (24.71, 23.78), "0.125": (21.92, 21.47)}}
MDLM = {"lm1b": 31.78, "owt": 25.19}
TITLES = {"lm1b": "Table 9, LM1B", "owt": "Table 10, OpenWebText"}


def run(lab: Lab) -> None:
    tables = {}
    for corpus, paper in PAPER.items():
        rows: list[list[Cell]] = []
        for alpha_0, (b, a) in paper.items():
            tag = alpha_0.replace(".", "")
            ours_b, ours_a = (bounds.nelbo_per_window(lab, f"{corpus}/{kind}_{tag}") for kind in ("esolm", "esolm_a"))
            rows.append([alpha_0, b, bounds.perplexity_of(ours_b), a, bounds.perplexity_of(ours_a),
                         bounds.mean(ours_b - ours_a)])
        mdlm = bounds.perplexity_of(bounds.nelbo_per_window(lab, f"{corpus}/mdlm"))
        rows.append(["MDLM", MDLM[corpus], mdlm, None, None, None])
        tables[TITLES[corpus]] = Table(["alpha_0", "(B), paper", "(B), ours", "(A), paper", "(A), ours",
                                        "ours: (B) above (A), nats per token"], rows)
    lab.report("tables_09_10_a_and_b", __doc__ or "", tables, draw=lambda figure: draw(figure, tables))


def draw(figure: Any, tables: dict[str, Table]) -> None:
    axes = figure.subplots(1, 2)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        *rows, mdlm = table.rows
        for column, style in ((1, "C0o--"), (2, "C0s-"), (3, "C1o--"), (4, "C1s-")):
            values = [cell.value if isinstance(cell, Estimate) else cell for cell in (row[column] for row in rows)]
            ax.plot([float(str(row[0])) for row in rows], values, style, label=table.columns[column])
        ax.axhline(mdlm[1], color="grey", linestyle="--", label="MDLM, paper")
        ax.axhline(mdlm[2].value if isinstance(mdlm[2], Estimate) else 0, color="grey", label="MDLM, ours")
        ax.set(xscale="log", yscale="log", xlabel="alpha_0", ylabel="test perplexity (NELBO)", title=title)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
