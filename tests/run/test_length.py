# SPDX-License-Identifier: Apache-2.0
"""A run that begins with a model folder may change its positions, and nothing else."""

import json
import re

import numpy as np

from qwen_jax import models
from qwen_jax.models import rope
from tests import runs
from tests.run.here import LEAN

YARN = '{"kind": "yarn", "factor": 4.0, "original_positions": 128}'
LONGER = [
    "--config.model.max_positions=4096",
    "--config.model.rope_theta=80000.0",
    f"--config.model.rope_scaling={YARN}",
    "--config.train.chunk_tokens=16",
    "--config.train.live_chunks=2",
    *[word for word in LEAN if "export" not in word],
]


def test_a_stage_of_longer_rows_changes_positions_alone(here, finished, tmp_path):
    folder, workdir = finished / "export", tmp_path / "next"
    code, out, err = here.run(workdir, f"--config.train.init_from={folder}", *LONGER)
    assert code == 0, err
    (line,) = [one for one in out.splitlines() if one.startswith("positions")]
    there = models.load(folder)[0]
    assert line == (
        f"positions, unlike in {folder}: "
        f"max_positions {there.max_positions} -> 4,096, "
        f"rope_theta {there.rope_theta:,.0f} -> 80,000, "
        "rope_scaling none -> yarn 4 on 128 (attention x 1.139)"
    )
    # What it exports is that model, for the next stage and for other programs.
    made, _ = models.load(workdir / "export")
    assert (made.rope_theta, made.max_positions) == (80_000, 4096)
    inverse_k, factor = rope.frequencies(made)
    plain_k = 80_000.0 ** -(np.arange(made.head_width // 2) * 2 / made.head_width)
    np.testing.assert_allclose(inverse_k[[0, -1]], plain_k[[0, -1]] / [1, 4])
    assert factor == 0.1 * np.log(4.0) + 1
    text = json.loads((workdir / "export" / "config.json").read_text())
    told = json.dumps(text)
    assert text["max_position_embeddings"] == 4096 and '"yarn"' in told
    # The rows were trained from its weights, not from random ones.
    assert runs.losses(workdir)[0] < runs.losses(finished)[0] - 0.5


def test_what_else_differs_is_another_model(here, finished, tmp_path):
    model = f"--config.train.init_from={finished / 'export'}"
    for key, value, was in (
        ("norm_eps", "1e-5", "1e-06"),
        ("window", "16", "0"),
    ):
        more = [model, f"--config.model.{key}={value}", *LONGER]
        err = here.refused(tmp_path / "wrong", *more)
        told = rf"{key} is {re.escape(was)} there, \S+ here; set --config.model"
        assert re.search(told, err), err


def test_rows_longer_than_the_positions_are_refused(here, finished, tmp_path):
    model = f"--config.train.init_from={finished / 'export'}"
    long = "--config.data.seq_tokens=8192"
    err = here.refused(tmp_path / "wrong", model, *LONGER, long)
    assert "data.seq_tokens=8192 passes model.max_positions=4096" in err
