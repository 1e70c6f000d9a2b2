"""Does it help to know what follows? Exact perplexity of held-out spans, given both sides of them, or the left alone.

Command:   python experiments/infilling.py runs/quickstart [MORE ...] --out runs/infilling.json
           (a picture beside it; a minute on two CPU cores per model of the quickstart's size)

A span of n tokens in the middle of each held-out window is scored from left to right, one token at a time, by
conditionals of an Eso-LM (B). What is given comes first in the order, ascending as in likelihood.conditionals and in
`sample`, or shuffled, as the clean tokens of training are.

Axes: B windows, L length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from eso_jax import families, likelihood, load
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.console import say
from eso_jax.data import evenly_spaced, windows_of
from eso_jax.engine.model import Model
from eso_jax.errors import require
from eso_jax.evaluation.picture import COLOURS, picture
from eso_jax.files import as_json, check_out, write_whole

SPANS = (1, 2, 4, 8, 16, 32)
GIVEN = ("the left", "both sides", "both, shuffled")


def span_nll(model: Model, windows: np.ndarray, span: int, given: str) -> np.ndarray:
    """-log p of the tokens of the middle span in nats per token, [B]."""
    length = windows.shape[1]
    first = (length - span) // 2
    place = np.arange(length)
    wanted = (place >= first) & (place < first + span)
    rank = np.where(wanted, length, place.astype(float))
    rank[first + span:] += 2 * length * (given == "the left")  # then behind the span, where nothing sees it
    rank = np.tile(rank, (len(windows), 1))
    if given == "both, shuffled":
        rank[:, ~wanted] = np.random.default_rng(0).random((len(windows), length - span))
    order = np.argsort(rank, axis=1, kind="stable").astype(np.int32)
    law = model.config.law()
    by_slot = model.rows(lambda weights, *arrays: likelihood.log_prob_in_order(weights, law, *arrays), len(windows),
                         lambda rows: (windows[rows].astype(np.int32), order[rows]))
    known = first if given == "the left" else length - span
    return -by_slot[:, known:known + span].mean(axis=1)


def measure(workdir: str, count: int) -> dict[str, Any]:
    model = load(workdir)
    families.get(model.config).check_conditionals()
    held_out = windows_of(model.config, "validation", tokenizer=model.tokenizer)
    windows = np.asarray(evenly_spaced(held_out, count)[:])
    spans = [span for span in SPANS if span <= windows.shape[1] // 2]
    found: dict[str, Any] = {"workdir": workdir, "family": model.config.family.name, "windows": len(windows),
                             "trained_at_alpha_0": families.alpha_0_of(model.config, None), "spans": spans}
    for given in GIVEN[:1] if model.config.family.name == "ar" else GIVEN:
        nll = np.stack([span_nll(model, windows, span, given) for span in spans])
        found[given] = {"nats_per_token": nll.mean(1).tolist(), "perplexity": np.exp(nll.mean(1)).tolist(),
                        "standard_error": (nll.std(1, ddof=1) / np.sqrt(len(windows))).tolist()}
        say(f"{workdir}, given {given}: perplexity of spans of {spans}: "
            + ", ".join(f"{value:.2f}" for value in found[given]["perplexity"]))
    return found


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    with picture(path, 4.5 * len(results), 3.6) as figure:
        all_axes = figure.subplots(1, len(results), sharey=True, squeeze=False)
        for axes, result in zip(all_axes[0], results, strict=True):
            for given, colour in zip(GIVEN, (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True):
                if given in result:
                    axes.errorbar(result["spans"], result[given]["nats_per_token"], result[given]["standard_error"],
                                  color=colour, label=f"given {given}", marker="o")
            axes.set(xscale="log", xticks=result["spans"], xticklabels=result["spans"], xlabel="tokens of the span",
                     title=f"{result['family']}, trained at alpha_0 = {result['trained_at_alpha_0']:g}")
            axes.minorticks_off()
        all_axes[0, 0].set_ylabel("nats per token")
        all_axes[0, 0].legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", help="work directories of Eso-LMs (B)")
    parser.add_argument("--windows", type=int, default=512, help="held-out windows (%(default)s)")
    parser.add_argument("--out", required=True, help=".json")
    arguments = parser.parse_args()
    check_out(arguments.out)
    require(arguments.out.endswith(".json"), "--out", arguments.out, "must end in .json")
    results = [measure(workdir, arguments.windows) for workdir in arguments.workdirs]
    write_whole(arguments.out, as_json(results))
    draw(Path(arguments.out).with_suffix(".png"), results)
    say(f"wrote {arguments.out}")


if __name__ == "__main__":
    keep_compilations()
    raise SystemExit(exit_code_of(main))
