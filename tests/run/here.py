# SPDX-License-Identifier: Apache-2.0
"""Runs in this process, on a mesh of its 8 devices."""

import shutil

from qwen_jax import cli, prepare
from tests import runs

MESH = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
SHORT = ["--config.train.num_steps=9", "--config.eval.every_steps=3"]
LEAN = [
    "--config.sample.every_steps=0",
    "--config.eval.every_steps=0",
    "--config.export=false",
    "--config.checkpoint.every_steps=0",
]


class Here:
    """Runs in this process; says what was compiled and printed."""

    def __init__(self, monkeypatch, capsys, data):
        self.capsys, self.data, self.compiled = capsys, data, 0
        real = prepare.compile_step

        def compile_step(setup):
            self.compiled += 1
            return real(setup)

        monkeypatch.setattr(prepare, "compile_step", compile_step)

    def run(self, workdir, *more, data=None):
        """(exit code, standard output, standard error)."""
        self.compiled = 0
        self.capsys.readouterr()
        words = runs.words(workdir, data or self.data, *MESH, *SHORT, arg="adamw")
        code = cli.main([*words, *more])
        return code, *self.capsys.readouterr()

    def refused(self, workdir, *more, data=None):
        """The error of a run that ends with 2, compiles nothing and writes nothing."""
        before = runs.contents(workdir)
        code, out, err = self.run(workdir, *more, data=data)
        assert code == 2, out + err
        last = err.rpartition("error: ")
        assert last[1] and all(x.startswith("warning: ") for x in last[0].splitlines())
        assert "Traceback" not in err
        assert self.compiled == 0
        assert runs.contents(workdir) == before
        return err


def back_to(workdir, step):
    """Leave only the checkpoints up to a step, as a kill after it would."""
    for one in runs.finished(workdir):
        if one > step:
            shutil.rmtree(workdir / "checkpoints" / f"{one:08d}")
