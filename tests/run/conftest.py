# SPDX-License-Identifier: Apache-2.0
"""What tests of whole runs share: a corpus, a finished run and copies of it."""

import shutil

import jax
import pytest

from qwen_jax import cli
from tests import runs
from tests.run.here import MESH, SHORT, Here


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def here(monkeypatch, capsys, data):
    return Here(monkeypatch, capsys, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 9 steps on 8 devices, to be copied."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        folder = jax.config.jax_compilation_cache_dir
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        words = runs.words(workdir, data, *MESH, *SHORT, arg="adamw")
        assert cli.main([*words, "--quiet"]) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")
