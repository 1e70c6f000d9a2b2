"""Measurements as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eso_jax.evaluation.picture import COLOURS, picture

Row = dict[str, Any]


def markdown(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A table of these columns, each a heading and how it shows a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(row) for show in columns.values()) + " |" for row in rows]) + "\n"


def bars(path: Path, title: str, unit: str, rows: dict[str, tuple[float, float]], measured: str, floor: str,
         scale: str = "linear") -> None:
    """A bar per row, its floor marked; those of Eso-LM stand out.

    Args:
      rows: by their labels, the lengths of bar and floor.
      measured, floor: what they are, for the legend.
    """
    with picture(path, height=1.2 + 0.32 * len(rows)) as figure:
        axes, places = figure.add_subplot(), np.arange(len(rows))[::-1]
        colours = [COLOURS[0] if label.startswith("Eso-LM") else COLOURS[1] for label in rows]
        axes.barh(places, [bar for bar, _ in rows.values()], color=colours, label=measured)
        axes.plot([mark for _, mark in rows.values()], places, "k|", markersize=12, label=floor)
        axes.set(xscale=scale, xlabel=unit, title=title, yticks=places, yticklabels=list(rows))
        axes.grid(visible=False, axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
