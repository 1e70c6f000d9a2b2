"""Samples of runs, how long they took, and how good they are, for the tables and figures made of them.

--scale paper judges as the paper does: Gen PPL under GPT-2 Large, MAUVE with ModernBERT-large features. --scale smoke
needs no network: both come from our own AR model, and numbers of the two scales do not compare.
"""

from __future__ import annotations

import functools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from eso_jax.engine.model import Model, Samples
from eso_jax.evaluation import judges, mauve, quality, texts
from eso_jax.evaluation.diversity import Estimate
from eso_jax.evaluation.judges import Judge
from eso_jax.evaluation.mauve import Features
from eso_jax.evaluation.texts import Texts
from eso_jax.files import npz, write_whole
from lab import Lab

JUDGE = "owt/ar"
COUNT, BATCH = {"smoke": 256, "paper": 5120}, {"smoke": 256, "paper": 512}
TOP_P = 0.9  # the paper's
REPEATS = 3  # timed generations; their median counts
PAPER_LENGTH = 1024  # of the paper's plans: steps shrink with the length


class Setting(NamedTuple):
    """How a model is sampled. `steps`: the paper's T, at its length of 1024, None for AR; see `steps_of`."""

    steps: int | None
    alpha_0: float | None = None
    plan: str | None = None
    num_tries: int = 1
    min_entropy: float | None = None


class Measures(NamedTuple):
    """What was measured: NFE and seconds of a batch, compilation not included, and the quality of all samples."""

    steps: int
    nfe: int
    seconds: float
    gen_ppl: Estimate
    entropy: Estimate
    mauve: Estimate
    repetition: Estimate
    redrawn: int


def measure(lab: Lab, run: str, setting: Setting) -> Measures:
    """Draws the run's samples in a setting, keeps them beside the model, and judges them."""
    path = path_of(lab, run, setting)

    def compute(model: Model) -> dict[str, Any]:
        samples, seconds = draw(lab, run, model, setting)
        drawn = texts.of_tokens(samples.tokens, model.tokenizer)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, npz(tokens=samples.tokens, order=samples.order, tokens_per_step=samples.tokens_per_step,
                              diffusion=samples.diffusion), "--runs")
        measured = quality.measure(drawn, judge(lab), reference(lab, run), features(lab))
        return {"nfe": len(samples.tokens_per_step), "seconds": seconds, "quality": measured.to_json(),
                "redrawn": int((samples.tries > 1).sum())}

    values = lab.measure(run, "samples", settings_of(lab, run, setting), compute)
    parts = values["quality"]
    estimates = {key: Estimate(*(math.nan if parts[key][of] is None else parts[key][of] for of in Estimate._fields))
                 for key in ("gen_ppl", "entropy", "mauve", "repetition")}
    return Measures(steps_of(lab, run, setting), values["nfe"], values["seconds"], redrawn=values["redrawn"],
                    **estimates)


def steps_of(lab: Lab, run: str, setting: Setting) -> int:
    """T in proportion to the run's length, at least 1."""
    return max(1, (setting.steps or 0) * lab.config(run).model.length // PAPER_LENGTH)


def settings_of(lab: Lab, run: str, setting: Setting) -> dict[str, Any]:
    """All that samples and what is said of them depend on beside the run."""
    return {**setting._asdict(), "steps": steps_of(lab, run, setting), "count": COUNT[lab.scale],
            "batch": BATCH[lab.scale], "top_p": TOP_P, "repeats": REPEATS,
            "judge": lab.workdir(JUDGE).name if lab.smoke else [judges.DEFAULT, mauve.DEFAULT]}


def path_of(lab: Lab, run: str, setting: Setting) -> Path:
    """Where `measure` keeps the samples."""
    return lab.path_of(run, "samples", settings_of(lab, run, setting), ".npz")


def draw(lab: Lab, run: str, model: Model, setting: Setting) -> tuple[Samples, float]:
    """Samples, and the median seconds of a batch."""
    steps, count, batch = steps_of(lab, run, setting), COUNT[lab.scale], BATCH[lab.scale]

    def sample(number: int) -> Samples:
        return model.sample(number, steps, setting.alpha_0, TOP_P, seed=0, batch_size=batch, plan=setting.plan,
                            num_tries=setting.num_tries, min_entropy=setting.min_entropy)

    samples = sample(count)
    timed = [sample(batch) for _ in range(REPEATS)]
    return samples, statistics.median(again.seconds - again.compile_seconds for again in timed)


@functools.cache
def judge(lab: Lab) -> Judge:
    return judges.ModelJudge(lab.model(JUDGE), "AR") if lab.smoke else judges.get(judges.DEFAULT)


@functools.cache
def features(lab: Lab) -> Features:
    return mauve.ModelFeatures(lab.model(JUDGE), "AR") if lab.smoke else mauve.get(mauve.DEFAULT)


@functools.cache
def reference(lab: Lab, run: str) -> Texts:
    """As many test windows as there are samples."""
    return texts.of_tokens(lab.test_windows(run, COUNT[lab.scale]), lab.model(run).tokenizer)


AXES = {"seconds": "seconds per batch", "nfe": "NFE, passes", "entropy": "entropy of the tokens, nats",
        "mauve": "MAUVE (more is better)", "gen_ppl": "Gen PPL (less is better)"}


def picture_of(points: dict[str, list[Measures]]) -> Any:
    """A function that draws quality against seconds and passes, and Gen PPL against entropy, by series; lines are
    frontiers, the best so far."""
    from eso_jax.evaluation.frontier import frontier

    def draw(figure: Any) -> None:
        figure.set_size_inches(11, 8)
        panels = (("seconds", "mauve", False), ("seconds", "gen_ppl", True), ("nfe", "gen_ppl", True),
                  ("entropy", "gen_ppl", True))
        for axes, (x, y, lower) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for number, (name, measured) in enumerate(points.items()):
                pairs = [(value_of(getattr(point, x)), value_of(getattr(point, y))) for point in measured]
                axes.plot(*zip(*pairs, strict=True), "o", color=f"C{number}", alpha=0.4, markersize=4)
                if x != "entropy":
                    axes.plot(*zip(*frontier(pairs, lower), strict=True), "-", color=f"C{number}", label=name)
                errors = [getattr(point, y).standard_error for point in points[name]]
                axes.errorbar(*zip(*pairs, strict=True), errors, fmt="none", ecolor=f"C{number}", alpha=0.4)
            axes.set(xlabel=AXES[x], ylabel=AXES[y], xscale="linear" if x == "entropy" else "log",
                     yscale="log" if lower else "linear")
        figure.axes[0].legend(fontsize=7)

    return draw


def value_of(number: Any) -> float:
    return number.value if isinstance(number, Estimate) else float(number)
