# SPDX-License-Identifier: Apache-2.0
"""What a resumed run may change, and how a refusal reads."""

import json

import pytest

from qwen_jax import config
from qwen_jax.checkpoint import compatible

MAY = ("num_steps", "checkpoint.*", "eval.*", "mesh.*")
OLD = {
    "num_steps": 100,
    "seed": 1,
    "optim": {"name": "adamw", "lr_peak": 1e-3, "betas": [0.9, 0.95]},
    "mesh": {"data": 1},
    "checkpoint": {"keep": 3, "deep": {"er": 1}},
    "data": {"sources": [{"path": "a"}]},
}


def changed(**changes):
    new = json.loads(json.dumps(OLD))
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = new
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return new


def test_no_difference_and_allowed_differences_pass():
    assert compatible.config_difference(OLD, OLD, MAY) == []
    new = changed(
        num_steps=200, mesh__data=4, checkpoint__keep=1, checkpoint__deep__er=2
    )
    assert compatible.config_difference(OLD, new, MAY) == []
    assert len(compatible.config_difference(OLD, new, ())) == 4


def test_tuples_equal_the_lists_they_were_stored_as():
    new = changed()
    new["optim"]["betas"] = (0.9, 0.95)
    assert compatible.config_difference(OLD, new, MAY) == []


def test_every_refused_key_is_shown_with_both_values():
    new = changed(seed=2, optim__lr_peak=1e-4, optim__extra="x")
    del new["optim"]["name"]
    assert compatible.config_difference(OLD, new, MAY) == [
        'optim.extra: <absent> in the checkpoint, "x" now',
        "optim.lr_peak: 0.001 in the checkpoint, 0.0001 now",
        'optim.name: "adamw" in the checkpoint, <absent> now',
        "seed: 1 in the checkpoint, 2 now",
    ]


def test_a_pattern_for_one_key_does_not_cover_another():
    new = changed(num_steps=5, data__sources=[{"path": "b"}])
    (line,) = compatible.config_difference(OLD, new, ("num_steps", "data"))
    assert line.startswith("data.sources")
    (line,) = compatible.config_difference(OLD, new, ("num", "data.*"))
    assert line.startswith("num_steps")


def test_long_values_are_cut():
    new = changed(data__sources=[{"path": "b" * 500}])
    (line,) = compatible.config_difference(OLD, new, MAY)
    assert len(line) < 200 and "..." in line


def test_a_refusal_names_the_run_the_changes_and_the_way_out():
    compatible.refuse(OLD, changed(num_steps=7), MAY, where="runs/a")
    with pytest.raises(config.InputError) as caught:
        compatible.refuse(OLD, changed(seed=3), MAY, where="runs/a")
    text = str(caught.value)
    assert "runs/a" in text and "seed: 1 in the checkpoint, 3 now" in text
    assert "--workdir" in text and "num_steps, checkpoint.*" in text
