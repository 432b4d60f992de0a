# SPDX-License-Identifier: Apache-2.0
"""Grids of shares as heat maps in inline SVG, and a page of them that loads nothing.

Formats: a grid is the JSON object that `qwen-jax eval needle --json` writes: lengths,
depths, found (a share for each length and depth), and words on what was measured.
Columns are lengths, rows are depths, the begin of the haystack on top. A share is told
by colour, red to green, and as a number in its cell.
Units: shares in percent. Pixels are of a box that grows with the grid.
Raises: nothing; titles are escaped here, numbers are formatted.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

LEFT, TOP, CELL_WIDTH, CELL_HEIGHT = 62, 8, 62, 24
STYLE = (
    "body{margin:0;background:#fbfbf9;color:#1d2129;font:15px/1.5 system-ui,sans-serif}"
    "main{max-width:1000px;margin:0 auto;padding:28px 20px}h1{font-size:24px}"
    "figure{margin:22px 0;background:#fff;border:1px solid #e4e5e1;border-radius:10px;"
    "padding:16px 18px}figcaption{margin-bottom:8px}svg{max-width:100%;height:auto}"
    "svg text{font-size:11px;fill:#646b78}svg .y{text-anchor:end}"
    "svg .x{text-anchor:middle}svg .cell{fill:#1d2129}"
)


def is_grid(record: Any) -> bool:
    """Whether a JSON value is a grid that can be drawn."""
    if not isinstance(record, dict):
        return False
    lengths, depths, found = (record.get(k) for k in ("lengths", "depths", "found"))
    rows = [lengths, depths, *(found if isinstance(found, list) else [None])]
    if not all(isinstance(row, list) and row for row in rows):
        return False
    flat = [value for row in rows for value in row]
    square = len(rows) - 2 == len(lengths)
    square = square and all(len(row) == len(depths) for row in rows[2:])
    return square and all(
        isinstance(value, int | float) and -1e15 < value < 1e15 for value in flat
    )


def figure(grid: Mapping[str, Any], title: str = "") -> str:
    """One grid as an HTML figure; cells say their numbers to a pointer, too."""
    lengths, depths, found = grid["lengths"], grid["depths"], grid["found"]
    right = LEFT + CELL_WIDTH * len(lengths)
    bottom = TOP + CELL_HEIGHT * len(depths)
    parts = []
    for j, depth in enumerate(depths):
        y = TOP + CELL_HEIGHT * j
        label = f"{100 * float(depth):.0f} %"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 16}" class="y">{label}</text>')
        for i, length in enumerate(lengths):
            parts.append(_cell(i, y, int(length), label, float(found[i][j])))
    for i, length in enumerate(lengths):
        x = LEFT + CELL_WIDTH * (i + 0.5)
        parts.append(
            f'<text x="{x:.0f}" y="{bottom + 16}" class="x">{int(length):,}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 34}" class="x">tokens</text>')
    shares = [float(share) for row in found for share in row]
    mean = sum(shares) / len(shares)
    words = f"found {mean:.1%}, worst cell {min(shares):.0%}"
    named = html.escape(title or str(grid.get("title", "Needles by depth and length")))
    return (
        f"<figure><figcaption><b>{named}</b> <span>{words}</span></figcaption>"
        f'<svg viewBox="0 0 {right + 8} {bottom + 42}" '
        f'style="width:{right + 8}px;max-width:100%" role="img" '
        f'aria-label="{named}: {words}">{"".join(parts)}</svg></figure>'
    )


def _cell(i: int, y: int, length: int, depth: str, share: float) -> str:
    x = LEFT + CELL_WIDTH * i
    # Red, yellow, green, pale enough for dark numbers on top.
    hue = 120 * min(max(share, 0.0), 1.0)
    told = f"{length:,} tokens, depth {depth}: {share:.0%}"
    return (
        f'<g><title>{told}</title><rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" '
        f'height="{CELL_HEIGHT - 2}" rx="3" fill="hsl({hue:.0f},62%,72%)"/>'
        f'<text x="{x + CELL_WIDTH / 2 - 1:.0f}" y="{y + 15}" class="x cell">'
        f"{100 * share:.0f}</text></g>"
    )


def page(grids: Sequence[Mapping[str, Any]], title: str) -> str:
    """A whole page with a heat map of each grid; no script, nothing is loaded."""
    named = html.escape(title)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    figures = "".join(figure(grid) for grid in grids)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{named}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{named}</h1>{figures}</main></body></html>\n"
    )
