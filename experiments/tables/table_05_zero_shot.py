"""Table 5: perplexity on other texts than those trained on (bounds; models of 250K steps on OpenWebText).

Command:   python experiments/tables/table_05_zero_shot.py --scale smoke
Data:      at --scale paper, for each set: eso-jax data prepare NAME --data-dir data/zero_shot --tokenizer gpt2
           --length 1024 --wrapping zero-shot; at --scale smoke, text that any installation has
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bounds
from eso_jax import families
from eso_jax.data import evenly_spaced, windows_of
from eso_jax.data.prepared import read_manifest
from eso_jax.engine import perplexity
from eso_jax.engine.model import Model
from eso_jax.errors import require
from eso_jax.evaluation.diversity import Estimate
from lab import RUNS, Cell, Lab, Table, main, paper

MODELS = {"AR": "owt/ar", "MDLM": "owt/mdlm", "BD3-LM, L' = 16": "owt/bd3lm_16", "Eso-LM, alpha_0 = 1": "owt/esolm_1",
          "Eso-LM, alpha_0 = 0.5": "owt/esolm_05", "Eso-LM, alpha_0 = 0.25": "owt/esolm_025",
          "Eso-LM, alpha_0 = 0.125": "owt/esolm_0125"}
PAPER = {name: RUNS[run].zero_shot for name, run in MODELS.items()}
PAPER = {"AR": PAPER["AR"], "MDLM": PAPER["MDLM"], "SEDD Absorb": paper.SEDD_ZERO_SHOT, **PAPER}  # in the paper's order
# Where the paper has the text from: a split of a prepared folder (LM1B's and AG News' test, else validation).
PREPARED = {"PTB": ("ptb", "validation"), "WikiText": ("wikitext103", "validation"), "LM1B": ("lm1b", "test"),
            "LAMBADA": ("lambada", "test"), "AG News": ("ag_news", "test"), "PubMed": ("pubmed", "validation"),
            "arXiv": ("arxiv", "validation")}
MOST = 512  # windows of a set at smoke scale


def run(lab: Lab) -> None:
    sets = embedded_sets() if lab.smoke else {name: (f"data/zero_shot/{folder}", split)
                                              for name, (folder, split) in PREPARED.items()}
    ours: list[list[Cell]] = []
    for name, experiment in MODELS.items():
        cells: list[Cell] = [name]
        for text, (source, split) in sets.items():
            nats = lab.measure(experiment, "zero-shot", {"text": text, "split": split, "most": MOST},
                               lambda model: nelbo(lab, model, source, split))
            cells.append(bounds.perplexity_of(np.array(nats)))
        ours.append(cells)
    tables = {"Paper": Table(["model", *paper.ZERO_SHOT],
                             [[name, *(values[text] for text in paper.ZERO_SHOT)] for name, values in PAPER.items()]),
              "Ours": Table(["model", *sets], ours)}
    notes = [f"{MOST} windows of each set at most; the text of \"package descriptions\" depends on what is installed."]
    lab.report("table_05_zero_shot", __doc__ or "", tables, notes if lab.smoke else [],
               lambda figure: draw(figure, tables))


def embedded_sets() -> dict[str, tuple[str, str]]:
    """Text beside the standard library's own source, which is trained on: (source, split) by name."""
    folder = Path(sysconfig.get_path("purelib"))
    sets = {"package descriptions": folder / "*.dist-info" / "METADATA",
            "NumPy's source": folder / "numpy" / "**" / "*.py",
            "C headers": folder / "numpy" / "**" / "*.h"}
    return {name: (str(path), "all") for name, path in sets.items()}


def nelbo(lab: Lab, model: Model, source: str, split: str) -> list[float]:
    """The NELBO of each window in nats per token."""
    if not lab.smoke:
        wrapping = read_manifest(source)["wrapping"]
        require(wrapping == "zero-shot", "data.source", source, f"was packed as {wrapping!r}; --help has the command")
    windows = windows_of(model.config, split, source, model.tokenizer)
    chosen = evenly_spaced(windows, MOST if lab.smoke else len(windows))
    terms = perplexity.nelbo_per_window(model, chosen, families.alpha_0_of(model.config, None), jax.random.key(0))
    return np.sum(list(terms.values()), axis=0).tolist()


def draw(figure: Any, tables: dict[str, Table]) -> None:
    axes = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        sets = table.columns[1:]
        for index, row in enumerate(table.rows):
            values = [cell.value if isinstance(cell, Estimate) else cell for cell in row[1:]]
            colour = f"C{list(PAPER).index(str(row[0]))}"  # of the same model in both
            ax.plot(np.arange(len(sets)) + 0.08 * index, values, "o", color=colour, markersize=4, label=str(row[0]))
        ax.set(yscale="log", xticks=range(len(sets)), ylabel="perplexity (bound)", title=title)
        ax.set_xticklabels(sets, rotation=25, ha="right", fontsize=8)
        ax.grid(visible=False, axis="x")
    axes[0].legend(fontsize=6)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
