# SPDX-License-Identifier: Apache-2.0
"""A run through stages is one without: losses, held-out text, samples, export."""

import json
import re

import numpy as np
import pytest

from qwen_jax import models
from tests.run import here

STAGES = ["--config.mesh.stage=2", "--config.rules.layers=stage"]
SHORT = ["--config.train.num_steps=4", "--config.eval.every_steps=2"]


def numbers(workdir):
    """Step, loss and held-out loss of all lines of the metrics."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "eval_loss")
    return [[json.loads(line).get(k, 0.0) for k in names] for line in lines]


@pytest.fixture
def run_here(monkeypatch, capsys, data):
    return here.Here(monkeypatch, capsys, data)


@pytest.mark.slow
def test_a_run_through_stages_is_one_without(run_here, tmp_path):
    told, exported = {}, {}
    for name, more in (("whole", []), ("stages", STAGES)):
        code, out, err = run_here.run(tmp_path / name, *SHORT, *more)
        assert code == 0, out + err
        told[name] = out + err
        _, params = models.load(tmp_path / name / "export", dtype="float32")
        exported[name] = params["layers"]["mlp"]["up_ldf"]
    line = "pipeline = 2 stages x 1 stretches, eager, 4 micro-batches in 12 ticks, in 4"
    assert line in told["stages"] and "pipeline" not in told["whole"]
    wanted, got = (np.array(numbers(tmp_path / x)) for x in ("whole", "stages"))
    assert len(wanted) >= 4 and (wanted[:, 2] > 0).sum() == 2
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_allclose(exported["stages"], exported["whole"], atol=1e-5)
    samples = [re.findall("sample at step.*\n.*", told[x]) for x in told]
    assert samples[0] == samples[1] and samples[0]
