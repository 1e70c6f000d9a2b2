"""Pictures of results: one style, and one way to write them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eso_jax.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of what is ours, of what it is compared with, and of a third; then of further ones.
COLOURS = ("#2a9d8f", "#9fc5e8", "#f4a261", "#6d597a", "#8d99ae", "#b56576")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8, "errorbar.capsize": 3,
    "lines.linewidth": 1.5}


@contextlib.contextmanager
def picture(path: Path, width: float = 9.0, height: float = 4.5, option: str = "--out") -> Iterator[Figure]:
    """A figure of this size in inches, to draw on; at the end of the block it is written to `path`, a .png.

    Raises:
      EsoError: it cannot be written; `option` is what named the place.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    # Not by pyplot, whose backend is the caller's: a notebook shows its figures by it.
    with rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"), option)
