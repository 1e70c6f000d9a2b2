"""Quality against passes and seconds, for every way to decode several tokens a pass with one Eso-LM (B).

Command:   python experiments/fewer_passes.py --size smoke --out runs/fewer_passes.json
           (a picture beside it; it trains a small model first, in runs/fewer_passes/smoke, or takes one: --workdir)
A GPU:     python experiments/fewer_passes.py --size 20m --train-seconds 240 --seconds 150 --samples 64 \\
             --out runs/fewer_passes_20m.json
The paper: python experiments/fewer_passes.py --size paper --workdir runs/paper/owt/esolm_1 --judge gpt2-large \\
             --out runs/fewer_passes_paper.json        (trained as experiments/paper.py says)

Whatever is decoded has the order that the one-token-a-pass sampler has, but for the decoders that find an order. Of the
samples of each setting, in bits per token:

  own    -log p of the samples by the law of one token a pass, along the order that they have. That of its own samples
         is the entropy of that law. Less is no better than more: a decoder that repeats itself is well below.
  lost   the divergence of the law that they were drawn by from that law: what drawing tokens of a pass independently
         costs. 0 for one token a pass, and for speculation.
  judge  -log p by another model, with --judge; and the entropy of a sample's own tokens (unigrams), which tells how
         varied it is. Held-out text has both as well.

Seconds are those of a sample, of so many decoded together (batch), without compilation.

Axes: N samples, L length.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import paper
from eso_jax import Config, FamilyConfig, ModelConfig, TrainConfig, families, load
from eso_jax.cli import exit_code_of, keep_compilations
from eso_jax.console import say
from eso_jax.data import evenly_spaced, override, windows_of
from eso_jax.decoding import decoders
from eso_jax.decoding.rejection import unigram_entropy
from eso_jax.engine.model import Model, Samples
from eso_jax.errors import RunAgain
from eso_jax.evaluation import judges
from eso_jax.evaluation.diversity import mean
from eso_jax.evaluation.judges import Judge
from eso_jax.evaluation.picture import COLOURS, picture
from eso_jax.evaluation.texts import of_tokens
from eso_jax.evaluation.throughput import describe_machine
from eso_jax.files import as_json, check_out, write_whole
from eso_jax.model.params import Weights
from eso_jax.quickstart import config as quickstart
from eso_jax.run.train import train

SIZES = {
    "smoke": dataclasses.replace(quickstart, family=FamilyConfig(name="esolm", alpha_0=1.0)),
    "20m": Config(
        model=ModelConfig(length=256, width=512, layers=8, heads=8, cond_dim=32, dropout=0.0),
        family=FamilyConfig(name="esolm", alpha_0=1.0),
        train=TrainConfig(steps=100_000, batch_size=128, learning_rate=1e-3, warmup=200, ema=0.999, log_every=100,
                          eval_every=100_000, save_every=100_000)),
    "paper": paper.RUNS["owt/esolm_1"].config}
OWN = "speculative, own k"
# Of each way to decode, the most wanted first. A fixed plan has T = L / number.
NUMBERS = {"one by one": (1,), "fixed plan": (4, 2, 8, 1, 16), "speculative": (4, 8, 2, 16, 1), OWN: (0,),
           "entropy": (4, 2, 8, 1, 0.3), "confidence": (0.3, 0.6, 0.1, 0.9), "likeliest": (2, 1, 4, 8),
           "margin": (2, 1, 4, 8)}
ALONE = ("one by one", "fixed plan", "speculative", OWN, "entropy")  # of which the first two are run at batch 1 too
WIDE = 16  # samples decoded together, where there is more than one
AT_HAND = 4  # samples decoded one by one
BITS = 1 / np.log(2)


def trained(config: Config, workdir: Path, seconds: float | None) -> Model:
    """The model of a work directory; trained there if it is not yet, for so many seconds where that is said."""
    if not (workdir / "config.json").exists():
        if seconds is not None:  # as if it were preempted: it saves, and ends
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
        try:
            train(config, workdir)
        except RunAgain:
            if seconds is None:
                raise
        finally:
            if seconds is not None:
                timer.cancel()
    return load(workdir)


def settings(model: Model) -> list[tuple[str, float, int, dict[str, Any]]]:
    """(decoder, its number, batch, arguments of `sample`), the most wanted first."""
    def how(name: str, number: float) -> dict[str, Any]:
        if name == OWN:
            return {"decoder": "speculative"}
        if name in decoders.names():
            return {"decoder": f"{name}:{number}"}
        return {"plan": "one-by-one"} if name == "one by one" else {"steps": model.config.model.length // int(number)}

    found = [(rank, -batch, name, number) for name, numbers in NUMBERS.items() for rank, number in enumerate(numbers)
             for batch in (WIDE, 1) if batch > 1 or (name in ALONE and rank < 2)]
    return [(name, number, -batch, how(name, number)) for _, batch, name, number in sorted(found, key=lambda x: x[:2])]


@functools.partial(jax.jit, static_argnums=0)
def score(config: Config, weights: Weights, tokens: jax.Array, order: jax.Array, first: jax.Array) -> jax.Array:
    return families.get(config).plan_log_likelihood(weights, config, tokens, order, first)


def log_p(model: Model, tokens: np.ndarray, order: np.ndarray, first: np.ndarray) -> np.ndarray:
    """log p of rows in the steps that begin at these slots, [N]."""
    arrays = [np.broadcast_to(x, tokens.shape).astype(np.int32) for x in (tokens, order, first)]
    return model.rows(functools.partial(score, model.config.law()), len(tokens),
                      lambda rows: [x[rows] for x in arrays], size=WIDE).sum(1)


def measure(model: Model, samples: Samples, judge: Judge | None) -> dict[str, Any]:
    """What is said of samples; errors over samples."""
    tokens, (count, length) = samples.tokens, samples.tokens.shape
    own = log_p(model, tokens, samples.order, np.arange(length)[None])
    law = (log_p(model, tokens, samples.order, samples.plan.step_begins) if samples.record is None
           else samples.record.logp.sum(1))
    widths = np.broadcast_to(samples.tokens_per_pass, (count, samples.tokens_per_pass.shape[-1]))
    values = {"passes": samples.passes.astype(float), "own": -own * BITS / length, "lost": (law - own) * BITS / length,
              "entropy": unigram_entropy(tokens, length) * BITS}
    if judge is not None:
        scores = judge.score(of_tokens(tokens, model.tokenizer))
        values["judge"] = scores.nats * BITS / scores.tokens.clip(1)
    return {**{name: mean(value).to_json() for name, value in values.items()},
            "tokens_per_pass": float(count * length / samples.passes.sum()),
            "widths": np.bincount(widths[widths > 0]).tolist()}


def run(model: Model, alpha_0: float | None, count: int, judge: Judge | None, deadline: float,
        out: Path) -> dict[str, Any]:
    """Measures setting by setting, and writes what there is after each."""
    length, rows = model.config.model.length, list[dict[str, Any]]()
    windows = windows_of(model.config, "validation", tokenizer=model.tokenizer)
    held_out = np.asarray(evenly_spaced(windows, count)[:], np.int32)
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(length), (len(held_out), 1)), axis=1)
    text = {"entropy": float(unigram_entropy(held_out, length).mean() * BITS),
            "own": float(-log_p(model, held_out, orders, np.arange(length)[None]).mean() * BITS / length)}
    found = {"machine": describe_machine(), "parameters": sum(x.size for x in jax.tree.leaves(model.weights)),
             "steps": model.step, "length": length, "alpha_0": families.alpha_0_of(model.config, alpha_0),
             "samples": count, "judge": judge and judge.name, "held_out": text, "rows": rows}
    for name, number, batch, how in settings(model):
        write_whole(out, as_json(found))
        if time.monotonic() > deadline:
            break
        several = count if batch > 1 else min(count, AT_HAND)
        draw = functools.partial(model.sample, several, alpha_0=alpha_0, batch_size=batch, **how)
        timed = samples = draw()
        if name in ("likeliest", "margin"):  # its law is no plan's: each token's own must be kept, which takes time
            samples = draw(record=True)
        row = {"decoder": name, "number": number, "batch": batch,
               "seconds": (timed.seconds - timed.compile_seconds) / several,
               "compile_seconds": timed.compile_seconds, **measure(model, samples, judge)}
        rows.append(row)
        say(f"{name}:{number:g}, batch {batch}: {row['tokens_per_pass']:.2f} tokens a pass, {row['seconds']:.3f} s; "
            f"bits: own {row['own']['value']:.3f}, lost {row['lost']['value']:.3f}, unigrams "
            f"{row['entropy']['value']:.2f}")
    write_whole(out, as_json(found))
    return found


def draw(path: Path, found: dict[str, Any]) -> None:
    """Quality against passes, seconds and variety, and how wide passes are."""
    names, colours = list(NUMBERS), dict(zip(NUMBERS, [*COLOURS, "#333333", "#999999"], strict=True))

    def rows_of(name: str, batch: int = WIDE) -> list[dict[str, Any]]:
        rows = [row for row in found["rows"] if row["decoder"] == name and row["batch"] == batch]
        return sorted(rows, key=lambda row: row["number"])

    def lines(axes: Any, x: str, y: str, batch: int = WIDE) -> None:
        for name in names:
            xs, ys = ([row[of]["value"] if isinstance(row[of], dict) else row[of] for row in rows_of(name, batch)]
                      for of in (x, y))
            axes.errorbar(xs, ys, [row[y]["standard_error"] for row in rows_of(name, batch)], color=colours[name],
                          label=name if batch > 1 else None, markersize=4, marker="o" if batch > 1 else "x",
                          linestyle="-" if batch > 1 else ":")

    quality, by = ("judge", "the judge") if found["judge"] else ("own", "the law of one token a pass")
    with picture(path, 13.0, 8.0) as figure:
        (lost, seconds, own), (varied, drafts, wide) = figure.subplots(2, 3)
        lines(lost, "passes", "lost")
        lost.set(xscale="log", xlabel="passes", title="What it loses: bits per token that the law is off")
        lines(seconds, "seconds", "lost")
        lines(seconds, "seconds", "lost", 1)
        seconds.set(xscale="log", xlabel=f"seconds of a sample, {WIDE} together (crosses: one alone)",
                    title="The same against seconds")
        for axes in (lost, seconds):
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=-0.002)
        lines(own, "passes", quality)
        own.set(xscale="log", xlabel="passes", title=f"Bits per token by {by}")
        lines(varied, "entropy", quality)
        varied.axvline(found["held_out"]["entropy"], color="k", linestyle="--", linewidth=1, label="held-out text")
        varied.set(xlabel="entropy of a sample's unigrams, bits", title="The same against variety")
        for axes in (own, varied) if quality == "own" else ():
            axes.axhline(found["held_out"]["own"], color="k", linestyle="--", linewidth=1)
        verified = rows_of("speculative")
        numbers = [row["number"] for row in verified]
        drafts.plot(numbers, [row["tokens_per_pass"] for row in verified], "o-", color=colours["speculative"])
        drafts.plot(numbers, [number + 1 for number in numbers], "k:", linewidth=1, label="all drafts accepted")
        scale = "log" if numbers else "linear"  # none: there was no time for it
        drafts.set(xscale=scale, yscale=scale, xlabel="drafts of a pass", title="Tokens a pass of speculation")
        for name in ("entropy", "confidence", "speculative", OWN):
            for row in rows_of(name)[len(rows_of(name)) // 2:][:1]:
                share = np.array(row["widths"])[1:] / sum(row["widths"])
                wide.plot(1 + np.arange(len(share)), share, "o-", markersize=4, color=colours[name],
                          label=name if name == OWN else f"{name}:{row['number']:g}")
        wide.set(xlabel="tokens of a pass", title="Share of the passes that are so wide")
        for axes in (drafts, wide):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        for axes in (lost, seconds, own, drafts):
            axes.minorticks_off()
        figure.legend(*varied.get_legend_handles_labels(), loc="outside lower center", ncols=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smoke", help="of the model that is trained (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="the model, or where it is trained (runs/fewer_passes/SIZE)")
    parser.add_argument("--train-seconds", type=float, help="training ends after so many, compilation included")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no setting is begun after so many")
    parser.add_argument("--samples", type=int, default=64, help="of each setting (%(default)s)")
    parser.add_argument("--alpha-0", type=float, help="share of each sample in random order (that of training)")
    parser.add_argument("--judge", help="a work directory, or a model of the transformers library")
    parser.add_argument("--out", type=Path, required=True, help=".json; pictures beside it")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the model that is trained")
    arguments = parser.parse_intermixed_args()
    check_out(arguments.out)
    judge = None if arguments.judge is None else judges.get(arguments.judge)
    config = override(SIZES[arguments.size], *arguments.overrides)
    model = trained(config, arguments.workdir or Path("runs/fewer_passes") / arguments.size, arguments.train_seconds)
    deadline = time.monotonic() + arguments.seconds
    found = run(model, arguments.alpha_0, arguments.samples, judge, deadline, arguments.out)
    if found["rows"]:
        draw(arguments.out.with_suffix(".png"), found)
    say(f"wrote {arguments.out}")


if __name__ == "__main__":
    keep_compilations()
    raise SystemExit(exit_code_of(main))
