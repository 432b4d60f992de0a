# SPDX-License-Identifier: Apache-2.0
"""The page itself: one run in full, or several against each other.

Source of the rules on what it may load: the W3C's Content Security Policy; the one
script is named by its SHA-256, so that nothing else can run.

Formats: `Run` records in, HTML text out. Cells of `_table` are HTML already: whatever
comes from a run folder passes `_e` first.
Units: shares are shown in percent; times in UTC.
Raises: nothing of its own.
"""

import base64
import datetime
import hashlib
import html
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from qwen_jax import config
from qwen_jax.report import heat, plot, record

SAMPLES = 6  # texts shown for each prompt, first and last among them
PLOTS = (  # title, key, key of the held-out values, factor, from zero
    ("Loss, nats per token", "loss", "eval_loss", 1, False),
    ("Bits per byte", "bits_per_byte", "eval_bits_per_byte", 1, False),
    ("Learning rate", "lr", "", 1, True),
    ("Gradient norm", "grad_norm", "", 1, False),
    ("Tokens per second", "tokens_per_s", "", 1, True),
    ("MFU, percent", "mfu", "", 100, True),
)


def render(runs: Sequence[record.Run], now_s: float) -> str:
    """The whole page; `now_s` is the time it is said to be written at."""
    here = pathlib.Path(__file__)
    style = here.with_name("page.css").read_text(encoding="utf-8")
    script = here.with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0], now_s) if len(runs) == 1 else _several(runs, now_s)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_e(title)} · qwen_jax</title><style>{style}</style></head>"
        f"<body><main>{body}<footer>Written {_date(now_s)} by qwen_jax. This file "
        f"loads nothing.</footer></main><script>{script}</script></body></html>\n"
    )


def _one(run: record.Run, now_s: float) -> str:
    kind, words = run.status(now_s)
    parts = [
        f'<header><h1>{_e(run.name)}</h1><span class="pill {kind}">{_e(words)}</span>',
        f"<p>{_e(_byline(run))}</p></header>",
        _notes(run),
        _tiles(run),
        _plots([run]),
        _section("Samples, by step", _samples(run)),
        _section("Needles in haystacks", "".join(map(heat.figure, run.grids))),
        _section("Timeline", _timeline(run)),
        _section("Checkpoints", _checkpoints(run)),
        _section("Data", _data(run)),
        _section("What to type next", _commands(run)),
        _section("Why these numbers", _derivation(run)),
        _section("What ran", _facts(run)),
        _configuration(run),
    ]
    return "".join(parts)


def _several(runs: Sequence[record.Run], now_s: float) -> str:
    names = _names(runs)
    results = [
        [f'<i class="s{i % 8}"></i>{_e(name)}', _e(run.status(now_s)[1])]
        + [_e(value) for value, _ in run.headline().values()]
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    flat = [config.flatten(run.settings()) for run in runs]
    differ = [
        [_e(key), *(_e(f.get(key, "")) for f in flat)]
        for key in sorted(set().union(*flat))
        if len({repr(f.get(key)) for f in flat}) > 1
    ]
    parts = [f"<header><h1>{len(runs)} runs</h1></header>"]
    parts += [_notes(run, f"{name}: ") for run, name in zip(runs, names, strict=True)]
    head = ["run", "state", *runs[0].headline()]
    parts.append(_section("Results", _table(results, head)))
    parts.append(_plots(runs))
    parts.append(_section("What differs", _table(differ, ["key", *names])))
    for run, name in zip(runs, names, strict=True):
        inside = _facts(run) + _commands(run)
        parts.append(f"<details><summary>{_e(name)}</summary>{inside}</details>")
    return "".join(parts)


def _names(runs: Sequence[record.Run]) -> list[str]:
    """Folder names, with the parent's where two are alike."""
    names = [run.name for run in runs]
    return [
        f"{run.folder.parent.name}/{run.name}"
        if names.count(run.name) > 1
        else run.name
        for run in runs
    ]


def _byline(run: record.Run) -> str:
    """Who, where, when in one line, of what run.json tells."""
    facts = run.facts
    versions = facts.get("versions")
    jax = versions.get("jax") if isinstance(versions, dict) else None
    commit = str(facts.get("commit") or "")[:10]
    said = [
        f"commit {commit}{', changed' if facts.get('dirty') else ''}" if commit else "",
        f"on {facts['host']}" if facts.get("host") else "",
        f"jax {jax}" if jax else "",
        f"started {_date(facts['started'])}" if facts.get("started") else "",
    ]
    return " · ".join(word for word in said if word)


def _tiles(run: record.Run) -> str:
    tiles = [
        f"<div><small>{_e(name)}</small><b>{_e(value)}</b><span>{_e(word)}</span></div>"
        for name, (value, word) in run.headline().items()
    ]
    skipped = run.points("skipped_steps")[0]
    if skipped and skipped[-1][1]:
        tiles.append(
            f'<div class="bad"><small>skipped steps</small><b>{skipped[-1][1]:.0f}</b>'
            "<span>not finite</span></div>"
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _plots(runs: Sequence[record.Run]) -> str:
    """Every plot that has points: colours tell runs, or training from held-out."""
    alone, figures = len(runs) == 1, []
    for title, key, held_key, factor, zero in PLOTS:
        series, lost = [], 0
        for i, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
            points, bad = run.points(key)
            points = [(x, y * factor) for x, y in points]
            lost += bad
            series.append(plot.Series("training" if alone else name, i % 8, points))
            held, bad = run.points(held_key)
            label, colour = ("held out", 1) if alone else (f"{name}, held out", i % 8)
            series.append(plot.Series(label, colour, held, dots=True))
            lost += bad
        bits = key == "bits_per_byte"
        level, named = (runs[0].gzip(), "gzip -9") if bits else (float("nan"), "")
        figures.append(
            plot.figure(
                title, series, zero=zero, level=level, level_name=named, lost=lost
            )
        )
    inside = "".join(figures)
    return f'<section class="plots">{inside}</section>' if inside else ""


def _samples(run: record.Run) -> str:
    """Texts of each prompt as training went on, first to last."""
    prompts: dict[str, list[dict]] = {}
    for row in run.samples:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    blocks = []
    for prompt, rows in prompts.items():
        shown = {round(i * (len(rows) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)}
        lines = [
            f"<tr><td>{rows[i]['step']:,}</td><td><q>{_e(prompt)}</q>"
            f"{_e(str(rows[i].get('text', ''))[:1000])}</td></tr>"
            for i in sorted(shown)
        ]
        blocks.append(f'<table class="samples">{"".join(lines)}</table>')
        if len(rows) > len(shown):
            blocks[-1] += f'<p class="more">{len(rows)} in all, see samples.jsonl.</p>'
    return "".join(blocks)


def _timeline(run: record.Run) -> str:
    known = ("step", "event", "time", "data", "counters")
    rows = []
    for row in run.events():
        when = _date(row.get("time", ""))
        said = ", ".join(f"{k} {v}" for k, v in row.items() if k not in known)
        rows.append([_e(row["event"]), f"{row['step']:,}", _e(when), _e(said)])
    return _table(rows, ["event", "step", "time", ""])


def _checkpoints(run: record.Run) -> str:
    rows = [
        [f"{step:,}", f"{size / 2**20:,.1f} MiB", _date(when_s)]
        for step, size, when_s in run.checkpoints
    ]
    return _table(rows, ["step", "size", "written"])


def _data(run: record.Run) -> str:
    """The last counters of the data pipeline that any line carries."""
    lines = [row.get("data", row.get("counters")) for row in run.rows]
    found = next((x for x in reversed(lines) if isinstance(x, dict)), {})
    rows = [
        [_e(key), f"{value:,}" if isinstance(value, int) else _e(value)]
        for key, value in config.flatten(found).items()
    ]
    if run.points("padding_share")[0]:
        share = run.median("padding_share", "{:.2%}".format)
        rows.append(["padding in a batch, median", share])
    return _table(rows, [])


def _commands(run: record.Run) -> str:
    """What to type next; a click selects a whole command."""
    again = run.facts.get("resume") or run.facts.get("command")
    if isinstance(again, list):
        again = shlex.join(map(str, again))
    report = f"qwen-jax report {shlex.quote(str(run.folder))}"
    what = "Go on from the last checkpoint:" if run.checkpoints else "Start it again:"
    lines = [(what, again)] if again else []
    lines.append(("Make this page again:", report))
    return "".join(f"<p>{what}</p><pre>{_e(line)}</pre>" for what, line in lines)


def _derivation(run: record.Run) -> str:
    """The lines a run prints at its start."""
    lines = run.facts.get("derivation")
    if not isinstance(lines, list):
        return ""
    return "".join(f"<p>{_e(line)}</p>" for line in lines)


def _facts(run: record.Run) -> str:
    """run.json but for what has a place of its own."""
    apart = ("config", "resume", "derivation")
    facts = {k: v for k, v in run.facts.items() if k not in apart}
    rows = [[_e(k), _e(v)] for k, v in config.flatten(facts).items()]
    return _table([*rows, ["folder", _e(run.folder)]], [])


def _configuration(run: record.Run) -> str:
    rows = [[_e(k), _e(v)] for k, v in config.flatten(run.settings()).items()]
    if not rows:
        return ""
    summary = f"<summary>Configuration, {len(rows)} values</summary>"
    return f"<details>{summary}{_table(rows, [])}</details>"


def _notes(run: record.Run, prefix: str = "") -> str:
    return "".join(f'<p class="note">{_e(prefix + note)}</p>' for note in run.notes)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>" if body else ""


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Rows of cells that are HTML already below a head that is text; "" for no rows."""
    if not rows:
        return ""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    if head:
        lines.insert(0, "".join(f"<th>{_e(cell)}</th>" for cell in head))
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{inside}</table></div>'


def _e(value: Any) -> str:
    """Text, safe in HTML and in a quoted attribute."""
    return html.escape(str(value))


def _date(when: Any) -> str:
    """Seconds since 1970 or ISO text -> text to read; other text as it is."""
    try:
        if isinstance(when, str):
            when = datetime.datetime.fromisoformat(when).timestamp()
        when = datetime.datetime.fromtimestamp(when, datetime.UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return str(when)
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")
