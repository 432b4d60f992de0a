# SPDX-License-Identifier: Apache-2.0
"""Text of a measurement: the table for the terminal and the paragraph for the log.

Formats: `record` is the dict that `train.collect` makes and `--json` writes; see there.
Units: seconds a step, tokens/s, GFLOP/s (10^9), shares of the faster plain matmul rate.
Raises nothing.
"""

from __future__ import annotations

from qwen_jax.bench import flags


def columns(rows: list[list[str]]) -> str:
    """Rows of cells as aligned columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def candidates(record: dict) -> str:
    """One line a candidate: times, rates, share of the matmul rate, ratios."""
    bases = [r["name"] for r in record["candidates"] if r["name"] in record["bases"]]
    head = ["candidate", "s/step", "spread", "tokens/s", "GFLOP/s", "of matmul"]
    head += ["causal"] + [f"x {base}" for base in bases] + ["others"]
    rows = [head]
    for row in record["candidates"]:
        if "error" in row:
            rows.append([row["name"], "-"] + [""] * (len(head) - 2))
            continue
        rows.append(_candidate(row, bases))
    return columns(rows)


def _candidate(row: dict, bases: list[str]) -> list[str]:
    time = row["time"]
    cells = [
        row["name"],
        f"{time['median_s']:.3f}",
        f"{time['least_s']:.2f}-{time['most_s']:.2f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['gflops_per_s']:.0f}",
        _share(row["share_of_matmul"]),
        _share(row["causal_share_of_matmul"]),
    ]
    for base in bases:
        ratio = row["ratios"].get(base)
        cells.append(f"{ratio['median']:.2f}" if ratio else "")
    return [*cells, f"{time['others']:.0%}"]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def facts(record: dict) -> str:
    """What was computed by whom: the check that all did equal work."""
    rows = [["candidate", "parameters", "tokens", "first loss", "last loss", "what"]]
    for row in record["candidates"]:
        if "error" in row:
            rows.append([row["name"], "", "", "", "", row["error"]])
            continue
        made = row["facts"]
        last = row["time"]["last_loss"]
        rows.append(
            [
                row["name"],
                f"{made['params']:,}",
                f"{made['tokens_per_step']:,}",
                f"{made['first_loss']:.3f}",
                f"{last:.3f}",
                f"{made['versions']}; {made['setting']}",
            ]
        )
    width = max(len(row[-1]) for row in rows)
    rows = [[*row[:-1], row[-1].ljust(width)] for row in rows]
    return columns(rows)


def matmul(record: dict) -> str:
    """The plain matmul rates of the run."""
    rates = [f"{k} {v:.0f}" for k, v in record["matmul_gflops_per_s"].items()]
    return f"plain float32 matmul, GFLOP/s: {', '.join(rates) or 'not measured'}"


def work(record: dict) -> str:
    """FLOPs of a step by the two counts."""
    full, causal = record["step_flops"] / 1e9, record["causal_step_flops"] / 1e9
    return f"{full:,.0f} GFLOP a step (full attention count), {causal:,.0f} causal"


def remarks(record: dict) -> list[str]:
    """What the tables do not say by themselves."""
    out = []
    rows = {row["name"]: row for row in record["candidates"] if "error" not in row}
    if {"ours", "loop"} <= set(rows):
        inside = rows["loop"]["ratios"]["ours"]["median"]
        whole = rows["ours"]["time"]["mean_s"] / rows["loop"]["time"]["mean_s"]
        out.append(
            f"through the real loop: {inside:.3f} of the bare step's speed (median "
            f"round), {whole:.3f} over all steps, checkpoints among them"
        )
    if any(row["time"]["others"] > 0.1 for row in rows.values()):
        out.append(
            "note: other processes took more than a tenth of the cores (column "
            "`others`); trust the ratios, not the absolute times"
        )
    return out


def length(rows: list[dict]) -> str:
    """Cost per token by row length."""
    out = [["tokens a row", "rows", "s/step", "us/token", "x shortest", "temp MB"]]
    for row in rows:
        out.append(
            [
                f"{row['tokens']:,}",
                str(row["rows"]),
                f"{row['median_s']:.2f}",
                f"{row['us_per_token']:.0f}",
                f"{row['x_shortest']:.2f}",
                f"{row['temp_bytes'] / 1e6:,.0f}",
            ]
        )
    return columns(out)


def loss_memory(rows: list[dict]) -> str:
    """Scratch memory of the loss beside that of the plain form."""
    out = [["tokens", "vocabulary", "logits MB", "weight MB", "ours MB", "plain MB"]]
    for row in rows:
        cells = [
            row[k] / 1e6
            for k in ("logits_bytes", "weight_bytes", "temp_bytes", "plain_temp_bytes")
        ]
        numbers = [f"{row['tokens']:,}", f"{row['vocab']:,}"]
        out.append(numbers + [f"{cell:,.0f}" for cell in cells])
    return columns(out)


def paragraph(record: dict) -> str:
    """The dated paragraph that `--log` appends to experiments/LOG.md."""
    parts = [flags.title(record, "train")]
    if record["candidates"]:
        parts.append(f"Shape: {record['describe']}; {work(record)}. {matmul(record)}.")
        parts += ["```text", candidates(record), "", facts(record), "```"]
        parts += remarks(record)
    if record["length"]:
        parts += ["```text", length(record["length"]), "```"]
    if record["loss_memory"]:
        parts += ["```text", loss_memory(record["loss_memory"]), "```"]
    return "\n".join(parts) + "\n"
