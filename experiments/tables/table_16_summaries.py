"""Table 16: summaries of news (XSum) after 10K steps of fine-tuning, rescaled BERTScore against the time they take.

Command:   python experiments/tables/table_16_summaries.py --scale smoke
Data:      at --scale paper: eso-jax data prepare xsum --data-dir data --tokenizer gpt2 --length 1024
           at --scale smoke, first lines of functions and of their descriptions in Python's library

The paper does not say how it trains or prompts. Here an article, a separator, its summary and a separator follow each
other in the stream that is trained on, and all of it is learned. To sample, the article and its separator are given,
the article cut so that there is room for a summary; the tokens behind them are drawn by the models' exact conditional
law, in T steps, and count up to a separator. The time is of one summary alone, its prompt included.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import numpy as np

import samples
import summaries
from eso_jax.data import Tokenizer
from eso_jax.engine.model import Model
from eso_jax.evaluation import bertscore, diversity
from eso_jax.evaluation.diversity import Estimate
from lab import RUNS, Cell, Lab, Table, main, paper

MODELS = {"Eso-LM, alpha_0 = 1": "xsum/esolm_1", "MDLM": "xsum/mdlm"}
SUMMARY = {"smoke": 48, "paper": 64}  # tokens that are drawn
COUNT = {"smoke": 256, "paper": 100_000}  # documents at most; XSum's test split has fewer


def run(lab: Lab) -> None:
    documents, references = summaries.pairs(lab, COUNT[lab.scale])
    rows: list[list[Cell]] = []
    for name, experiment in MODELS.items():
        for steps, (milliseconds, score) in RUNS[experiment].summaries.items():
            settings = {"steps": steps, "count": COUNT[lab.scale], "tokens": SUMMARY[lab.scale],
                        "top_p": samples.TOP_P, "encoder": samples.settings_of(lab, experiment, samples.Setting(steps))
                        ["judge"] if lab.smoke else bertscore.DEFAULT}
            found = lab.measure(experiment, "summaries", settings, lambda model: measure(
                lab, model, steps, documents, references))
            rows.append([name, steps, score, Estimate(*found["score"]), milliseconds, 1000 * found["seconds"],
                         found["words"]])
    rows.append(["FLAN-T5-small", None, paper.FLAN_T5, None, None, None, None])
    table = Table(["model", "T", "BERTScore, paper", "ours", "ms at most, paper", "ms, ours", "ours, words"], rows)
    notes = [f"{len(documents)} summaries of at most {SUMMARY[lab.scale]} tokens, nucleus {samples.TOP_P}; F of "
             "BERTScore, rescaled. References have "
             f"{statistics.mean(len(text.split()) for text in references):.3g} words.",
             "The paper's times are of an A6000 Ada."]
    if lab.smoke:
        notes.append("Scored by the states of our own AR model; 0 is what descriptions of other functions get.")
    lab.report("table_16_summaries", __doc__ or "", {"": table}, notes, lambda figure: draw(figure, rows))


def measure(lab: Lab, model: Model, steps: int, documents: list[str], references: list[str]) -> dict[str, Any]:
    assert model.tokenizer is not None
    given, size = prompts(model, documents, SUMMARY[lab.scale]), SUMMARY[lab.scale]
    how: dict[str, Any] = {"steps": steps, "top_p": samples.TOP_P, "max_tokens": size}
    drawn = model.sample(1, given=given, **how)
    texts = [summary(tokens[~known], model.tokenizer) for tokens, known in zip(drawn.tokens, drawn.given, strict=True)]
    alone = [model.sample(1, given=given[:1], **how) for _ in range(samples.REPEATS)]
    found = bertscore.score(texts, references, encoder(lab))
    return {"score": diversity.mean(found[:, 2]), "words": statistics.mean(len(text.split()) for text in texts),
            "seconds": statistics.median(each.seconds - each.compile_seconds for each in alone)}


def prompts(model: Model, documents: list[str], size: int) -> np.ndarray:
    """Rows that begin with a document and a separator and have `size` unknown tokens behind them, int [N, L]."""
    tokenizer, config = model.tokenizer, model.config.model
    assert tokenizer is not None
    rows = np.full((len(documents), config.length), config.mask, np.int32)
    for row, document in zip(rows, documents, strict=True):
        ids = tokenizer.join([document], separate=False)[:config.length - size - 1]
        row[:len(ids) + 1] = [*ids, tokenizer.separator_id]
    return rows


def summary(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of what was drawn, up to a separator or the first token that was not drawn."""
    end = np.flatnonzero((tokens == tokenizer.separator_id) | (tokens == tokenizer.mask_id))
    return tokenizer.decode(tokens[:end[0]] if len(end) else tokens)


def encoder(lab: Lab) -> bertscore.Encoder:
    return bertscore.ModelEncoder(lab.model(samples.JUDGE), "AR") if lab.smoke else bertscore.TransformersEncoder()


def draw(figure: Any, rows: list[list[Cell]]) -> None:
    for axes, shift, title in zip(figure.subplots(1, 2), (0, 1), ("paper, XSum", "ours"), strict=True):
        for name in MODELS:
            points = [(row[4 + shift], row[2 + shift], row[1]) for row in rows if row[0] == name]
            values = [samples.value_of(score) for _, score, _ in points]
            errors = [score.standard_error if isinstance(score, Estimate) else 0 for _, score, _ in points]
            axes.errorbar([time for time, _, _ in points], values, errors, fmt="o-", label=name)
            for (time, _, steps), value in zip(points, values, strict=True):
                axes.annotate(f"T = {steps}", (time, value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel="milliseconds per summary", ylabel="BERTScore, rescaled (more is better)", title=title)
    figure.axes[0].axhline(paper.FLAN_T5, color="grey", linestyle="--", label="FLAN-T5-small")
    figure.axes[0].legend()


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
