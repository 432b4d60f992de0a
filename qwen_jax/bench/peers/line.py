# SPDX-License-Identifier: Apache-2.0
"""What every peer script does apart from its model: JSON lines on stdin and stdout.

Source: this project. A peer runs in its own environment, so this file needs only
the standard library and numpy.
Format: one JSON object a line. Requests:
  {"do": "build", "shape": {...}, "options": {...}} -> {"ok": true, "params": n, ...}
  {"do": "steps", "n": k}  -> {"ok": true, "seconds": s, "cpu_s": c, "losses": [..]}
  {"do": "stop"}           -> {"ok": true}, then the process ends
A failure answers {"ok": false, "error": "...", "trace": "..."} and ends the process.
Units: seconds are of the wall for all k steps together, cpu_s is process time.
Options that all understand: threads (cores to stay on), lr, clip (0 = none).
Invariant: a peer computes only between a request and its answer; what libraries
print on stdout goes to stderr, so the answers stay readable.
Raises nothing: errors become answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback


def batch(shape: dict, seed: int = 0):
    """The same random (tokens, targets), int64 [rows, tokens], for every peer."""
    import numpy as np

    draw = np.random.default_rng(seed)
    size = (shape["rows"], shape["tokens"] + 1)
    row = draw.integers(0, shape["vocab"], size)
    return row[:, :-1].copy(), row[:, 1:].copy()


def serve(build) -> None:
    """Answer requests until "stop"; `build(shape, options) -> (facts, steps)`.

    `facts` is a JSON-able dict (params, tokens_per_step, versions, setting) and
    `steps(n)` runs n training steps to the end and returns their losses.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    steps = None
    for text in sys.stdin:
        request = json.loads(text)
        try:
            if request["do"] == "build":
                _use_cores(request["options"]["threads"])
                began = time.perf_counter()
                facts, steps = build(request["shape"], request["options"])
                answer = dict(facts, build_s=time.perf_counter() - began)
            elif request["do"] == "steps":
                answer = _timed(steps, request["n"])
            elif request["do"] == "stop":
                answer = {}
            else:
                raise ValueError(f"unknown request {request['do']!r}")
        except Exception as error:
            answer = {
                "ok": False,
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
            }
            answers.write(json.dumps(answer) + "\n")
            raise SystemExit(1) from error
        answers.write(json.dumps(dict(answer, ok=True)) + "\n")
        if request["do"] == "stop":
            break
    answers.close()
    # Some libraries hang or crash in their exit handlers; the answers are out.
    os._exit(0)


def _use_cores(count: int) -> None:
    """Stay on the first `count` cores: thread pools made later size by what is left."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _timed(steps, n: int) -> dict:
    cpu, wall = time.process_time(), time.perf_counter()
    losses = steps(n)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "losses": [float(loss) for loss in losses],
    }
