# SPDX-License-Identifier: Apache-2.0
"""One HTML page on a run, or on several side by side: report.html.

Reads what a run folder holds (run.json, metrics.jsonl, samples.jsonl, checkpoints/) and
writes a single file that needs no network: numbers, plots, samples, configuration,
timeline. It may be asked for at any time: of a run that is going, was killed, or has
barely begun; what is missing or broken is said on the page.

`record.py` reads a run folder, `plot.py` draws, `page.py` puts the page together.

Formats: metrics.jsonl as `metrics.py` describes it; HTML with inline SVG, light or dark
as the reader's system is. Its policy forbids every load and every script but its own.
Invariants: every text from a run folder is escaped (samples are a model's output); the
page is replaced in one piece.
Raises: config.InputError for a folder that is not there or holds nothing of a run.
"""

import os
import pathlib
import time
from collections.abc import Sequence

from qwen_jax import config
from qwen_jax.report import page, record


def write(
    workdirs: Sequence[pathlib.Path | str], out: pathlib.Path | str | None = None
) -> pathlib.Path:
    """Write the page on one run, or the comparison of several; returns its path.

    Args:
      workdirs: run folders.
      out: file to write; by default report.html in the run folder, or in the folder
        that holds the first run folder when there are several.
    """
    runs = [record.load(workdir) for workdir in workdirs]
    if not runs:
        raise config.InputError(
            "no run folder given; wanted qwen-jax report WORKDIR ..."
        )
    home = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    out = pathlib.Path(out) if out else home / "report.html"
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(page.render(runs, time.time()), encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise config.InputError(
            f"{out}: cannot be written ({error.strerror}); choose another with --out"
        ) from error
    return out


def main(workdirs: Sequence[str], out: str = "") -> int:
    """`qwen-jax report`: write the page and say where it is."""
    print(write(workdirs, out or None))
    return 0
