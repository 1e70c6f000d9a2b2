"""One Eso-LM for many alpha_0, or one for each? Bits per byte of held-out text by models trained alike.

Command:   python experiments/many_alpha_0.py --out runs/many_alpha_0.json [section.field=value ...]
           (a table and a picture beside it; six models for each seed, twenty minutes on two idle CPU cores; repeated,
           it goes on where it was)

Each model has the same steps, so that the one for many has a fifth of what the five others have together. All are
measured on the same windows with the same draws, the average of the seeds. Errors are over windows: differences between
models are surer.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eso_jax import load
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.config import Config
from eso_jax.console import say
from eso_jax.data import evenly_spaced, override, windows_of
from eso_jax.engine import perplexity
from eso_jax.errors import EsoError, require
from eso_jax.evaluation.picture import COLOURS, picture
from eso_jax.files import as_json, check_out, write_whole
from eso_jax.quickstart import config as quickstart
from eso_jax.run.train import train

ALPHAS = (0.0625, 0.125, 0.25, 0.5, 1.0)
MANY = f"{ALPHAS[0]:g} to {ALPHAS[-1]:g}"
SMALL = ("model.length=64", "model.width=64", "model.layers=2", "model.cond_dim=16", "train.steps=600",
         "train.save_every=600", "train.eval_every=600", "train.eval_windows=64")
WINDOWS, DRAWS = 512, 4


def run_of(trained: str, seed: int, overrides: list[str]) -> Config:
    """The run trained at an alpha_0, or at many."""
    own = f"family.alpha_0={trained}"
    if trained == MANY:
        own = f"family.alpha_0_range=({ALPHAS[0]},{ALPHAS[-1]})"
    return override(quickstart, *SMALL, "family.alpha_0=1", own, f"train.seed={seed}", *overrides)


def bits(run: Config, workdir: Path) -> dict[str, list[float]]:
    """Bits per byte of each window, by the alpha_0 they are measured at; trains the model where it is not yet."""
    train(run, workdir)
    model = load(workdir)
    # The bound does not depend on what the model was trained at: a law for all of them is compiled once.
    law = dataclasses.replace(model, config=dataclasses.replace(run, family=run.family.change(
        alpha_0=1.0, alpha_0_range=None)))
    windows = np.asarray(evenly_spaced(windows_of(run, "validation"), WINDOWS)[:])
    num_bytes = model.tokenizer.num_bytes(windows) if model.tokenizer else None
    if num_bytes is None:
        raise EsoError(f"data.tokenizer = {run.data.tokenizer!r}: it is not known how many bytes its tokens stand for")
    scale = windows.size / num_bytes / np.log(2)
    found = {}
    for alpha_0 in ALPHAS:
        terms = perplexity.nelbo_per_window(law, windows, alpha_0, jax.random.key(0), DRAWS)
        found[f"{alpha_0:g}"] = (np.sum(list(terms.values()), axis=0) * scale).tolist()
    return found


def summary(found: dict[str, list[dict[str, list[float]]]]) -> dict[str, dict[str, Any]]:
    """By what a model was trained at and what it is measured at: the mean, its error over windows, and each seed's."""
    rows: dict[str, dict[str, Any]] = {}
    for trained, seeds in found.items():
        rows[trained] = {}
        for alpha_0 in seeds[0]:
            values = np.array([each[alpha_0] for each in seeds])
            mean = values.mean(0)
            rows[trained][alpha_0] = {"bits_per_byte": float(mean.mean()), "seeds": values.mean(1).tolist(),
                                      "standard_error": float(mean.std(ddof=1) / np.sqrt(len(mean)))}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [["trained at", *(f"at {alpha_0:g}" for alpha_0 in ALPHAS)], ["---"] * (len(ALPHAS) + 1)]
    lines += [[trained, *(f"{cell['bits_per_byte']:.3f} ± {cell['standard_error']:.3f}" for cell in row.values())]
              for trained, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    with picture(path, 6.0, 4.2) as figure:
        axes = figure.subplots()
        for trained, row in rows.items():
            if trained != MANY:
                axes.plot(ALPHAS, [cell["bits_per_byte"] for cell in row.values()], color=COLOURS[4], alpha=0.4,
                          label="each of these, at others" if trained == f"{ALPHAS[0]:g}" else None)
        each = [rows[f"{alpha_0:g}"][f"{alpha_0:g}"] for alpha_0 in ALPHAS if f"{alpha_0:g}" in rows]
        for label, cells, colour in ((f"one model for {MANY}", list(rows.get(MANY, {}).values()), COLOURS[0]),
                                     ("a model for each", each, COLOURS[2])):
            if len(cells) == len(ALPHAS):
                axes.errorbar(ALPHAS, [cell["bits_per_byte"] for cell in cells],
                              [cell["standard_error"] for cell in cells], color=colour, marker="o", label=label)
        axes.set(xscale="log", xticks=ALPHAS, xticklabels=[f"{alpha_0:g}" for alpha_0 in ALPHAS],
                 xlabel="alpha_0 of the bound", ylabel="bits per byte, held-out (less is better)")
        axes.minorticks_off()
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of every run")
    parser.add_argument("--seeds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", required=True, help=".json; work directories go to a folder of that name")
    arguments = parser.parse_intermixed_args()
    check_out(arguments.out)
    require(arguments.out.endswith(".json"), "--out", arguments.out, "must end in .json")
    out, found = Path(arguments.out), dict[str, list[dict[str, list[float]]]]()
    for seed in range(1, arguments.seeds + 1):
        for trained in (MANY, *(f"{alpha_0:g}" for alpha_0 in ALPHAS)):
            run = run_of(trained, seed, arguments.overrides)
            workdir = out.with_suffix("") / f"{trained.replace(' ', '-')}-{seed}"
            found.setdefault(trained, []).append(bits(run, workdir))
            rows = summary(found)
            write_whole(out, as_json({"config": run_of(MANY, 1, arguments.overrides).to_json(), "trained_at": rows}))
            write_whole(out.with_suffix(".md"), table(rows))
            draw(out.with_suffix(".png"), rows)
    say(f"{table(rows)}wrote {out}")


if __name__ == "__main__":
    keep_compilations()
    raise SystemExit(exit_code_of(main))
