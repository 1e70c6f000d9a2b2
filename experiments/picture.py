"""Draws the README's picture from the code itself: a decoding plan, and who sees whom in each family.

Command:   python experiments/picture.py                 writes experiments/figures/how_it_works.png
           python experiments/picture.py samples.npz     draws the plan of what `eso-jax sample` wrote: samples.png
           (seconds, any machine)
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from eso_jax.cli import exit_code_of, read_plan
from eso_jax.console import say
from eso_jax.decoding.order import random_then_ascending
from eso_jax.decoding.plan import Plan, join
from eso_jax.evaluation.picture import picture
from eso_jax.model import masks

LENGTH, PARALLEL_STEPS = 16, [2, 1, 3, 2]  # then one token per step
COLOURS = ListedColormap(["#e8e8e8", "#f4a261", "#2a9d8f", "#9fc5e8"])
MASKED, PARALLEL, SEQUENTIAL, CACHED = range(4)
OUT = Path(__file__).parent / "figures" / "how_it_works.png"


def decoding(axes: Axes, plan: Plan) -> None:
    """One row per forward pass, one column per position: what is decoded, cached or still masked."""
    order = np.asarray(plan.order[0])
    grid = np.full((plan.nfe, plan.length), MASKED)
    for step, (first, count) in enumerate(zip(plan.first, plan.tokens_per_step, strict=True)):
        grid[step, order[:first]] = CACHED
        grid[step, order[first:first + count]] = PARALLEL if first < plan.diffused else SEQUENTIAL
    axes.imshow(grid, cmap=COLOURS, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.set(title=f"{plan.length} tokens in {plan.nfe} passes", xlabel="position", ylabel="forward pass")
    labels = ["masked, not computed", "decoded in parallel (diffusion)", "decoded left to right", "clean, in the cache"]
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS(i)) for i in range(4)]
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8, frameon=False)


def pattern(axes: Axes, title: str, mask: np.ndarray) -> None:
    axes.imshow(mask, cmap=ListedColormap(["white", "#2a9d8f"]), vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.set(title=title, xticks=[], yticks=[], xlabel="key, by order", ylabel="query")
    axes.title.set_fontsize(9)


def draw_plan(path: Path) -> None:
    """The plan of a .npz of eso-jax sample, its first row."""
    plan = join([read_plan(str(path), "NPZ")[0].rows(np.arange(1))])
    with picture(path.with_suffix(".png"), 7.0, 6.0, "picture") as figure:
        decoding(figure.add_subplot(), plan)
    say(f"wrote {path.with_suffix('.png')}")


def draw_how_it_works() -> None:
    order = random_then_ascending(jax.random.key(4), LENGTH, sum(PARALLEL_STEPS))
    counts = PARALLEL_STEPS + [1] * (LENGTH - sum(PARALLEL_STEPS))
    slots = jnp.arange(8)
    query, key = slots[:, None], slots[None, :]
    both = np.zeros((16, 16), bool)
    both[:8, :8], both[:8, 8:] = masks.own_block(query, key, 1), masks.blocks_before(query, key, 1)
    both[8:, 8:] = masks.causal(query, key)
    patterns = {"MDLM: everyone, no cache": masks.everyone(query, key),
                "Eso-LM, diffusion: causal\nalong the order, exact cache": masks.causal(query, key),
                "Eso-LM (A), diffusion:\nclean prefix sees itself": masks.prefix(query, key, 4),
                "Eso-LM, sequential:\nmasked copy, then clean copy": both}
    OUT.parent.mkdir(exist_ok=True)
    with picture(OUT, 11.0, 4.6, "picture") as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1], squeeze=False)[0]
        decoding(left.subplots(), Plan(order[None], np.array(counts), sum(PARALLEL_STEPS)))
        for axes, (title, mask) in zip(right.subplots(2, 2).flat, patterns.items(), strict=True):
            pattern(axes, title, np.asarray(mask))
    say(f"wrote {OUT}")


def main() -> None:
    for name in sys.argv[1:]:
        draw_plan(Path(name))
    if not sys.argv[1:]:
        draw_how_it_works()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
