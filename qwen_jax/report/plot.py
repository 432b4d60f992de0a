# SPDX-License-Identifier: Apache-2.0
"""Curves over the step as one HTML figure with inline SVG.

A long curve is drawn as means of neighbouring points with their lowest and highest as
a band. The vertical axis turns logarithmic by itself when most of a positive curve lies
in the lowest quarter. Colours come from page.css; page.js writes the values under the
pointer into the caption.

Shapes: points are (step, value), steps ascending. Pixels are of a WIDTH x HEIGHT box.
Invariants: points are finite; at most POINTS are drawn of each curve, all curves of a
figure being averaged over the same number of points.
Raises: nothing; labels and titles are escaped here.
"""

import dataclasses
import html
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence

from qwen_jax import metrics

POINTS = 240
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 220, 50, 548, 10, 194

Scale = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: its label, colour number (0 to 7) and points; dots mark each point."""

    label: str
    colour: int
    points: list[tuple[float, float]]
    dots: bool = False


def figure(
    title: str,
    series: Sequence[Series],
    *,
    zero: bool = False,
    level: float = math.nan,
    level_name: str = "",
    lost: int = 0,
) -> str:
    """The figure of all series that have points; "" when none has.

    Args:
      title: text above it.
      series: curves.
      zero: begin the vertical axis at zero.
      level, level_name: a value to mark across (nan: none) and what it is.
      lost: non-finite values that are not among the points, to be told.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    size = math.ceil(max(len(s.points) for s in series) / POINTS)
    curves = [averaged(s.points, 1 if s.dots else size) for s in series]
    xs = [x for points in curves for x, *_ in points]
    ys = [y for points in curves for _, *three in points for y in three]
    ys += [level] if math.isfinite(level) else []
    ys += [0.0] if zero else []
    log = min(ys) > 0 and max(ys) > 4 * statistics.median(ys)
    x_at = _scale(min(xs), max(xs), LEFT, RIGHT, log=False)
    y_at = _scale(min(ys), max(ys), BOTTOM, TOP, log=log)
    parts = _axes(xs, ys, x_at, y_at, log)
    if math.isfinite(level):
        y = y_at(level)
        parts.append(
            f'<path class="level" d="M{LEFT} {y:.1f}H{RIGHT}"/><text x="{RIGHT}" '
            f'y="{y - 4:.1f}" class="y">{html.escape(level_name)}</text>'
        )
    for s, points in zip(series, curves, strict=True):
        parts.append(_curve(s, points, x_at, y_at))
    told = f"<em>{lost} non-finite values are not drawn</em>" if lost else ""
    return (
        f'<figure data-plot="{html.escape(_spots(curves, x_at))}">'
        f"<figcaption><b>{html.escape(title)}</b>{_legend(series)}{told}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)} by step">{"".join(parts)}'
        '<path class="cursor" d=""/></svg></figure>'
    )


def averaged(
    points: Sequence[tuple[float, float]], size: int
) -> list[tuple[float, float, float, float]]:
    """(last step, mean, lowest, highest) of every `size` neighbours."""
    out = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ys = [y for _, y in group]
        out.append((group[-1][0], statistics.fmean(ys), min(ys), max(ys)))
    return out


def _axes(xs: list, ys: list, x_at: Scale, y_at: Scale, log: bool) -> list[str]:
    parts = [f'<text x="{LEFT - 6}" y="{BOTTOM + 18}" class="y">step</text>']
    for tick in ticks(min(ys), max(ys), log):
        y = y_at(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="y">{_number(tick)}</text>'
        )
    for tick in ticks(min(xs), max(xs), False):
        parts.append(
            f'<text x="{x_at(tick):.1f}" y="{BOTTOM + 18}" class="x">'
            f"{_number(tick)}</text>"
        )
    return parts


def _curve(series: Series, points: list, x_at: Scale, y_at: Scale) -> str:
    at = [(x_at(x), y_at(y), y_at(low), y_at(high)) for x, y, low, high in points]
    out = ""
    if any(low != high for _, _, low, high in at):
        lower = [f"{x:.1f} {low:.1f}" for x, _, low, _ in at]
        upper = [f"{x:.1f} {high:.1f}" for x, _, _, high in reversed(at)]
        out = f'<path class="band s{series.colour}" d="M{"L".join(lower + upper)}Z"/>'
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in at)
    out += f'<path class="line s{series.colour}" d="M{line}"/>'
    if series.dots or len(at) == 1:
        dots = [f'cx="{x:.1f}" cy="{y:.1f}"' for x, y, _, _ in at]
        out += "".join(f'<circle class="s{series.colour}" {d} r="3"/>' for d in dots)
    return out


def _spots(curves: list, x_at: Scale) -> str:
    """For page.js: of each curve [step, value, pixel] of its points."""
    return json.dumps(
        [
            [[x, float(f"{y:.5g}"), round(x_at(x), 1)] for x, y, *_ in points]
            for points in curves
        ],
        separators=(",", ":"),
    )


def _legend(series: Sequence[Series]) -> str:
    """Swatch, label, room for the value under the pointer; one curve needs no name."""
    if len(series) == 1:
        return "<span><output></output></span>"
    return "".join(
        f'<span><i class="s{s.colour}{" dot" if s.dots else ""}"></i>'
        f"{html.escape(s.label)} <output></output></span>"
        for s in series
    )


def _scale(low: float, high: float, start: float, end: float, *, log: bool) -> Scale:
    """value -> pixels; a value that is alone stands in the middle."""
    if log:
        linear = _scale(math.log(low), math.log(high), start, end, log=False)
        return lambda v: linear(math.log(v))
    if high == low:
        return lambda v: (start + end) / 2
    return lambda v: start + (v - low) / (high - low) * (end - start)


def ticks(low: float, high: float, log: bool = False, most: int = 6) -> list[float]:
    """About `most` round numbers within [low, high], on powers of ten if `log`."""
    if (high - low) / most < sys.float_info.min:  # nothing, or too little to divide
        return [low]
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        inside = [
            t for e in decades for m in (1, 2, 5) if low <= (t := m * 10.0**e) <= high
        ]
        if len(inside) > most + 2:
            inside = [t for e in decades if low <= (t := 10.0**e) <= high]
            inside = inside[:: math.ceil(len(inside) / most)]
        if len(inside) > 2:
            return inside  # fewer: the range is short, even steps read better
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if (high - low) / (m * unit) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return metrics.count(value) if abs(value) >= 1e4 else f"{value:.4g}"
