# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax serve` with a fake engine, as a process: serve_fake.py HOW ARGUMENTS...

HOW: "fast", "slow" (0.1 s a token), "loading" (for ever), "input" and "fault" (the
engine cannot be made)."""

import sys
import time

from qwen_jax import cli, config, serving
from tests.serve import fake_engine, scripts


def main():
    how, *words = sys.argv[1:]

    def make_engine(model):
        if how == "loading":
            time.sleep(600)
        if how == "input":
            raise config.InputError("the model has no weights: give another")
        if how == "fault":
            raise RuntimeError("broken")
        engine = fake_engine.Engine(model, scripts.SCRIPT)
        engine.delay_s = 0.1 if how == "slow" else 0.0
        return engine

    cli.VERBS["serve"] = lambda args, _: serving.run(args, make_engine=make_engine)
    return cli.main(["serve", *words])


if __name__ == "__main__":
    raise SystemExit(main())
