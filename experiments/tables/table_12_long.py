"""Table 12: models of L = 1024 after 1K steps of fine-tuning at ten times the length, one token per pass (NFE = L).

Command:   python experiments/tables/table_12_long.py --scale smoke
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import samples
from eso_jax.decoding.rejection import unigram_entropy
from eso_jax.engine.model import Model
from eso_jax.evaluation import diversity
from eso_jax.evaluation.diversity import Estimate
from eso_jax.evaluation.texts import of_tokens
from eso_jax.files import npz, write_whole
from lab import RUNS, Cell, Lab, Table, main

MODELS = {"BD3-LM, L' = 4": "owt/long_bd3lm_4", "Eso-LM, alpha_0 = 0.125": "owt/long_esolm_0125"}
COUNT = 16  # samples judged; seconds are of one alone, as the paper's


def run(lab: Lab) -> None:
    rows: list[list[Cell]] = []
    for name, experiment in MODELS.items():
        paper = RUNS[experiment].long
        assert paper is not None
        settings = {"count": COUNT, "top_p": samples.TOP_P}
        path = lab.path_of(experiment, "long-samples", settings, ".npz")
        found = lab.measure(experiment, "long-samples", settings, lambda model: measure(lab, model, path))
        rows.append([name, paper.gen_ppl, Estimate(*found["gen_ppl"]), paper.entropy, Estimate(*found["entropy"]),
                     paper.seconds, found["seconds"], found["cut"]])
    columns = ["model", *(f"{what}, {whose}" for what in ("Gen PPL", "entropy", "s") for whose in ("paper", "ours")),
               "ours, not judged to the end"]
    length = lab.config("owt/long_bd3lm_4").model.length
    notes = [f"L = {length}, {COUNT} samples, nucleus {samples.TOP_P}; seconds of one sample, draws included, "
             "compilation not."]
    if lab.smoke:
        notes.append("The judge is our AR model, which reads a sample in windows of its own length.")
    lab.report("table_12_long", __doc__ or "", {"": Table(columns, rows)}, notes, lambda figure: draw(figure, rows))


def measure(lab: Lab, model: Model, path: Path) -> dict[str, Any]:
    """Judges samples, and keeps them in `path`."""
    many = model.sample(COUNT, 1, top_p=samples.TOP_P, batch_size=COUNT, plan="one-by-one")
    model.sample(1, 1, top_p=samples.TOP_P, plan="one-by-one")  # compiles
    alone = model.sample(1, 1, top_p=samples.TOP_P, plan="one-by-one")
    path.parent.mkdir(exist_ok=True)
    write_whole(path, npz(tokens=many.tokens, order=many.order), "--runs")
    tokens = many.tokens
    if lab.smoke:
        tokens = tokens.reshape(-1, lab.config(samples.JUDGE).model.length)
    scores = samples.judge(lab).score(of_tokens(tokens, model.tokenizer))
    entropy = unigram_entropy(np.asarray(many.tokens), many.tokens.shape[1])
    return {"gen_ppl": scores.perplexity(), "entropy": diversity.mean(entropy),
            "seconds": alone.seconds - alone.compile_seconds, "cut": scores.cut}


def draw(figure: Any, rows: list[list[Cell]]) -> None:
    at, names = np.arange(len(rows)), [str(row[0]).replace(", ", ",\n") for row in rows]
    for axes, offset, what in zip(figure.subplots(1, 3), (1, 3, 5), (
            "Gen PPL (less is better)", "entropy of the tokens, nats", "seconds per sequence"), strict=True):
        for shift, whose in ((0, "paper"), (1, "ours")):
            cells = [row[offset + shift] for row in rows]
            errors = [cell.standard_error if isinstance(cell, Estimate) else 0 for cell in cells]
            axes.bar(at + 0.4 * shift, [samples.value_of(cell) for cell in cells], 0.4, yerr=errors, label=whose)
        axes.set(ylabel=what, xticks=at + 0.2, xticklabels=names, yscale="log" if offset == 5 else "linear")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
