"""Table 11: seconds for one long sequence, one token per pass (NFE = L), batch 1, random weights.

Command:   python experiments/tables/table_11_latency.py --scale smoke
           --scale paper needs a GPU; the paper's numbers are of an A6000 and of passes alone, ours include the draws

The measurements are those of `eso-jax bench sampling`, which has more of them (see eso_jax/evaluation/throughput.py).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from eso_jax.evaluation import throughput
from lab import Cell, Lab, Table, main, paper

LENGTHS = {"smoke": (256, 1024), "paper": paper.LATENCY_LENGTHS}
PRESETS = {"smoke": "cpu", "paper": "table11"}


def run(lab: Lab) -> None:
    out, lengths, preset = lab.runs / "table_11.json", LENGTHS[lab.scale], PRESETS[lab.scale]
    lab.runs.mkdir(parents=True, exist_ok=True)
    found = lab.measure_all("table-11", {"preset": preset, "lengths": lengths},
                            lambda: throughput.run(preset, out, lengths=lengths, batches=(1,)))
    seconds = {(row["sampler"], row["length"]): row for row in found}
    columns = ["sampler"]
    for paper_length, length in zip(LENGTHS["paper"], lengths, strict=True):
        columns += [f"paper, L = {paper_length}, s", "times Eso-LM", f"ours, L = {length}, s", "times Eso-LM",
                    "of the floor"]
    rows: list[list[Cell]] = []
    for sampler, papers in paper.LATENCY.items():
        cells: list[Cell] = [sampler]
        for published, eso, length in zip(papers, paper.LATENCY["Eso-LM"], lengths, strict=True):
            row = seconds[sampler, length]
            cells += [published, published / eso, row["seconds"], row["times_eso_lm"],
                      f"{100 * row['of_the_floor']:.0f}%"]
        rows.append(cells)
    lab.report("table_11_latency", __doc__ or "", {"": Table(columns, rows)},
               ["MDLM's seconds are scaled from one pass to its NFE."], lambda figure: draw(figure, rows, lengths))


def draw(figure: Any, rows: list[list[Cell]], lengths: tuple[int, ...]) -> None:
    axes = figure.subplots(1, 2)
    for ax, offset, length, published in zip(axes, (1, 6), lengths, LENGTHS["paper"], strict=True):
        at = np.arange(len(rows))
        ax.barh(at + 0.2, [row[offset + 1] for row in rows], 0.4, label=f"paper, L = {published}")
        ax.barh(at - 0.2, [row[offset + 3] for row in rows], 0.4, label=f"ours, L = {length}")
        ax.set(xscale="log", xlabel="seconds, in those of Eso-LM", yticks=at, yticklabels=[row[0] for row in rows])
        ax.invert_yaxis()
        ax.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
