"""Frontiers: the best quality that any setting reaches within a budget of seconds or passes."""

from __future__ import annotations

from collections.abc import Iterable

Point = tuple[float, float]


def frontier(points: Iterable[Point], lower_is_better: bool) -> list[Point]:
    """The points (cost, quality) that beat every cheaper one, by cost: the paper's "best so far"."""
    sign = 1 if lower_is_better else -1
    best: list[Point] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best
