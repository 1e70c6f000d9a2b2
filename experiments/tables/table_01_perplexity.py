"""Table 1: test perplexity on LM1B and OpenWebText, the NELBO and the exact likelihood's bound from many orders.

Command:   python experiments/tables/table_01_perplexity.py --scale smoke
Time:      see experiments/results/smoke; --scale paper: 9K H200 hours in all, by the paper's account

The paper's main claim is the order of these numbers: perplexity falls as alpha_0 does, from masked diffusion to AR.
Below the table, the steps between neighbours are tested on the same windows.

What the paper calls AR + AdaLN is alpha_0 = 0 itself, whose masked tokens see those before them; our row of that name
has the usual inputs, shifted by one. At smoke scale it lags behind, because its gates begin at zero: a model of shifted
inputs can first learn bigrams without opening any, while two streams can do nothing before theirs are open (that is our
guess; that the gates are the cause is measured). Validation nats per token after 1000 steps (2 cores of an AMD EPYC,
2026-11-24, commit ccc4818), for three seeds (train.seed = 1, 2, 3; data.seed = 0, 2, 3):
  alpha_0 = 0     1.355, 1.405, 1.368
  AR + AdaLN      1.447, 1.408, 1.430
and for the first seed, AR + AdaLN whose gates begin at one (train.start_from an AR without AdaLN that took one step at
a rate of 1e-9): 1.319; AR without AdaLN: 1.340. So the two differ by 0.05 with a standard error of 0.02, of seeds.

At alpha_0 = 1 the 128 windows of the notes are too few to tell the exact likelihood's bound from the NELBO: on 512
windows, 64 orders each against 64 draws each, the NELBO is 0.059 +- 0.019 nats per token above it (same machine).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

import bounds
from eso_jax.evaluation.diversity import Estimate
from lab import AS_ABOVE, NOTE_AS_ABOVE, RUNS, Cell, Lab, Table, main

METHODS = {"AR": "ar", "AR + AdaLN": "ar_adaln", "MDLM": "mdlm", "BD3-LM, L' = 16": "bd3lm_16",
           "BD3-LM, L' = 8": "bd3lm_8", "BD3-LM, L' = 4": "bd3lm_4", "Eso-LM, alpha_0 = 1": "esolm_1",
           "Eso-LM, alpha_0 = 0.5": "esolm_05", "Eso-LM, alpha_0 = 0.25": "esolm_025",
           "Eso-LM, alpha_0 = 0.125": "esolm_0125", "Eso-LM, alpha_0 = 0.0625": "esolm_00625",
           "Eso-LM, alpha_0 = 0": "esolm_0"}
CORPORA = {"lm1b": "LM1B", "owt": "OpenWebText"}
ORDERS = {"smoke": {"lm1b": 64, "owt": 64}, "paper": {"lm1b": 5000, "owt": 1000}}
MDLM_ORDERS = {"smoke": 16, "paper": 1000}
WINDOWS = {"smoke": 128, "paper": 1024}  # that the exact likelihood's bound is measured on
STEPS = ["esolm_1", "esolm_05", "esolm_025", "esolm_0125", "esolm_0"]


def run(lab: Lab) -> None:
    tables, notes, series = {}, [], {}
    for corpus, title in CORPORA.items():
        rows = [row(lab, corpus, method) for method, name in METHODS.items() if f"{corpus}/{name}" in RUNS]
        tables[lab.heading(corpus)] = Table(
            ["method", "paper, NELBO", "ours, NELBO", "paper, exact", "ours, exact"], rows)
        notes += [f"{title}'s recipes: {note}" for note in comparisons(lab, corpus)]
        series[title] = rows
    orders = ORDERS[lab.scale]
    windows = "2048 test windows, 4 draws each" if lab.smoke else "all test windows"
    notes = [f"Ours, NELBO: of {windows}. Ours, exact: of {WINDOWS[lab.scale]} test windows by {orders['lm1b']} "
             f"(LM1B's recipes) and {orders['owt']} (OpenWebText's) orders each, MDLM's by {MDLM_ORDERS[lab.scale]}; "
             "for AR and alpha_0 = 0, of the NELBO's windows. So the two columns are of different windows; the notes "
             "below compare on the same.",
             "The paper's BD3-LM runs on LM1B are BD3-LM's authors', fine-tuned from MDLM; ours are from scratch. Our "
             "AR scores all tokens of a window, its first, which is easy on LM1B, included.", *notes]
    if lab.smoke:
        notes.insert(0, NOTE_AS_ABOVE)
    lab.report("table_01_perplexity", __doc__ or "", tables, notes, lambda figure: draw(figure, series))


def row(lab: Lab, corpus: str, method: str) -> list[Cell]:
    name = METHODS[method]
    run = f"{corpus}/{name}"
    nelbo: Cell = bounds.perplexity_of(bounds.nelbo_per_window(lab, run))
    exact: Cell
    if name in ("ar", "ar_adaln", "esolm_0"):
        nelbo, exact = None, nelbo  # one and the same, and no bound
    elif name.startswith("bd3lm") or not lab.smoke and name == "mdlm" and corpus == "owt":
        exact = None  # the paper has none
    else:
        exact = bounds.perplexity_of(exact_per_window(lab, corpus, name))
    if lab.is_as_above(run):
        nelbo, exact = (cell and AS_ABOVE for cell in (nelbo, exact))
    return [method, RUNS[run].nelbo, nelbo, RUNS[run].exact, exact]


def exact_per_window(lab: Lab, corpus: str, name: str) -> np.ndarray:
    """The bound from many orders; MDLM's, of L passes per order, from fewer."""
    orders, most = ORDERS[lab.scale][corpus], WINDOWS[lab.scale]
    if name == "mdlm":
        orders = MDLM_ORDERS[lab.scale]
    run = f"{corpus}/{name}"
    return bounds.bound_per_window(bounds.log_prob(lab, run, orders, most), lab.config(run).model.length)


def comparisons(lab: Lab, corpus: str) -> list[str]:
    """Paired by window, differences in nats per token; those of runs that stand above are not said again."""
    nelbo = {name: bounds.nelbo_per_window(lab, f"{corpus}/{name}") for name in [*STEPS, "ar_adaln"]}
    new = {name for name in nelbo if not lab.is_as_above(f"{corpus}/{name}")}
    notes = [f"NELBO of {a} above {b}: {_difference(nelbo[a] - nelbo[b])}" for a, b in zip(STEPS, STEPS[1:])
             if new & {a, b}]
    if new & {"esolm_0", "ar_adaln"}:
        notes += [f"alpha_0 = 0 (two streams) against AR + AdaLN (inputs shifted by one): "
                  f"{_difference(nelbo['esolm_0'] - nelbo['ar_adaln'])}; the errors are of windows, not of training"]
    for name in STEPS[:-1]:
        if name not in new:
            continue
        most = WINDOWS[lab.scale]
        several = bounds.nelbo_per_window(lab, f"{corpus}/{name}", most, samples=16)
        notes.append(f"NELBO of {name} above its exact likelihood's bound on the same {most} windows: "
                     f"{_difference(several - exact_per_window(lab, corpus, name))}")
    return notes


def _difference(nats: np.ndarray) -> str:
    value, error = bounds.mean(nats)
    return f"{value:+.4f} ± {error:.4f} nats ({value / error:+.1f} standard errors)"


def draw(figure: Any, series: dict[str, list[list[Cell]]]) -> None:
    """Ours against alpha_0, the baselines as lines, and the paper's beside them."""
    axes = figure.subplots(1, 2)
    (title, rows), *_ = series.items()
    for which, (ax, name) in enumerate(zip(axes, ("ours", "paper"), strict=True)):
        for kind, column, marker in (("NELBO", 1 + (1 - which), "o-"), ("exact", 3 + (1 - which), "s--")):
            found = {str(row[0]): row[column] for row in rows if row[column] is not None}
            points = [(float(method.split("= ")[-1]), _value(cell)) for method, cell in found.items()
                      if method.startswith("Eso-LM")]
            ax.plot(*zip(*points, strict=True), marker, label=f"Eso-LM, {kind}")
            for method, colour in (("MDLM", "C3"), ("AR", "C2")):
                if method in found and not math.isnan(_value(found[method])):
                    ax.axhline(_value(found[method]), color=colour, linestyle=marker[1:], linewidth=1,
                               label=f"{method}, {kind}")
        ax.set(xlabel="alpha_0", ylabel="test perplexity", title=f"{name}, {title}" if name == "paper" else name)
        ax.legend(fontsize=7)


def _value(cell: Cell) -> float:
    return cell.value if isinstance(cell, Estimate) else float(cell or math.nan)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
