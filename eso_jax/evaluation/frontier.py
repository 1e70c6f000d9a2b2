"""Frontiers: the best quality that any setting reaches within a budget of seconds or passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from eso_jax.config import require

Point = tuple[float, float]


def frontier(points: Iterable[Point], lower_is_better: bool) -> list[Point]:
    """The points (cost, quality) that beat every cheaper one, by cost: the paper's "best so far"."""
    sign = 1 if lower_is_better else -1
    best: list[Point] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best


def plot(path: Path, series: Mapping[str, Iterable[Point]], x: str, y: str, lower_is_better: bool) -> None:
    """Draws named series of points (cost, quality) and the frontier of each, cost on a logarithmic axis, to a PNG.

    Args:
      x, y: what the axes show, with units.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for number, (name, given) in enumerate(series.items()):
        points = list(given)
        require(bool(points), "series", name, "has no points")
        require(min(cost for cost, _ in points) > 0, "series", name, "costs must be positive, for a logarithmic axis")
        best = frontier(points, lower_is_better)
        colour = f"C{number}"
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.4, markersize=4)
        axes.plot(*zip(*best, strict=True), "o-", color=colour, markersize=5, label=name)
    axes.set(xscale="log", xlabel=x, ylabel=f"{y} ({'lower' if lower_is_better else 'higher'} is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
