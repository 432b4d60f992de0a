# SPDX-License-Identifier: Apache-2.0
"""This project's step through the real `qwen-jax run`: data, logging, checkpoints on.

Source: main.run on an experiment written for the shape: text read, tokenized and packed
while training, metrics.jsonl and the progress line written every step, asynchronous
checkpoints every `save_every` steps. The only thing replaced is the step function that
`loop.loop` is given: it is wrapped so that the loop waits between the turns of the
measurement; inside a turn nothing waits for the wrapper.
Options: as in ours_train, plus workdir (an empty folder), save_every.
Invariants: the loop runs in the main thread (it owns the signal handlers), requests are
answered by another; a turn ends when the last step's arrays are ready, so no work of
one turn falls into another candidate's turn.
Raises: through line.serve; what ends the loop comes out of the turn that waits for it.
"""

from __future__ import annotations

import json
import pathlib
import queue
import sysconfig
import threading
import traceback

import line

WARM_STEPS = 2
# A part of the standard library: its vocabulary is learnt in seconds.
TEXT = ("asyncio", "email", "http", "importlib", "json", "multiprocessing", "xml")


class Gate:
    """Lets the loop make as many steps as it was told to, and no more."""

    def __init__(self):
        self.orders: queue.Queue = queue.Queue()
        self.answers: queue.Queue = queue.Queue()
        self.left, self.losses, self.last = 0, [], None

    def order(self, n: int) -> list[float]:
        """Ask for n steps and wait until they are done; called by the other thread."""
        self.orders.put(n)
        answer = self.answers.get()
        if isinstance(answer, str):
            raise RuntimeError(answer)  # the words of the loop's failure
        return answer

    def wrap(self, step):
        """The same step, held back where no order is open."""
        import jax

        def gated(state, batch, *rest):
            if self.left == 0:
                if self.last is not None:
                    jax.block_until_ready(self.last)
                    self.answers.put([float(loss) for loss in self.losses])
                self.left, self.losses = self.orders.get(), []
            self.left -= 1
            state, metrics = step(state, batch, *rest)
            self.losses.append(metrics["loss"])
            # Not the state: the loop donates it to the next step.
            self.last = metrics
            return state, metrics

        return gated


def experiment(shape: dict, options: dict) -> str:
    """The text of an experiment file with this shape, on the Python library here."""
    record = {
        "data": {
            "sources": [
                {
                    "path": sysconfig.get_paths()["stdlib"],
                    "include": [f"{name}/*.py" for name in TEXT],
                }
            ],
            "vocab_size": min(2048, shape["vocab"]),
            "seq_tokens": shape["tokens"],
        },
        "model": {
            "vocab_size": shape["vocab"],
            "width": shape["width"],
            "num_layers": shape["layers"],
            "num_heads": shape["heads"],
            "num_kv_heads": shape["kv_heads"],
            "head_width": shape["head_width"],
            "ffn_width": shape["ffn"],
            "tie_embedding": shape["tied"],
            "rope_theta": shape["rope_theta"],
            "max_positions": max(32768, shape["tokens"]),
        },
        "optim": {
            "name": "adamw",
            "lr_peak": options["lr"],
            "warmup_steps": 0,
            "decay_embedding": True,
            "clip_norm": options["clip"],
        },
        "train": {
            "num_steps": 1_000_000,
            "batch_tokens": shape["rows"] * shape["tokens"],
            "micro_rows": shape["rows"],
            "loop": options.get("loop", "scan"),
            "remat": options.get("remat", "none"),
        },
        "checkpoint": {"every_steps": options["save_every"], "keep": 1},
        "eval": {"every_steps": 0},
        "export": False,
    }
    text = json.dumps(record).replace("true", "True").replace("false", "False")
    return (
        "import ml_collections\n\n\n"
        f"def get_config(arg=None):\n    return ml_collections.ConfigDict({text})\n"
    )


def build(shape: dict, options: dict):
    """Start the run, warm it up, return facts and the stepper."""
    folder = pathlib.Path(options["workdir"])
    file = folder / "loop.py"
    file.write_text(experiment(shape, options))
    STARTED.put((file, folder / "run"))
    first = GATE.order(WARM_STEPS)
    import jax

    facts = {
        "params": json.loads((folder / "run" / "run.json").read_text())["num_params"],
        "tokens_per_step": shape["rows"] * shape["tokens"],
        "first_loss": first[0],
        "versions": f"qwen_jax, jax {jax.__version__}",
        "setting": f"qwen-jax run, checkpoint every {options['save_every']} steps",
    }
    return facts, GATE.order


def main() -> None:
    """Answer requests in a thread; run the loop here once the shape is known."""
    threading.Thread(target=line.serve, args=(build,), daemon=True).start()
    file, workdir = STARTED.get()
    from qwen_jax import main as program
    from qwen_jax.train import loop

    plain = loop.loop
    loop.loop = lambda now, step, *rest, **given: plain(
        now, GATE.wrap(step), *rest, **given
    )
    try:
        program.run(program.Options(config=str(file), workdir=str(workdir)))
        GATE.answers.put("the run ended by itself")
    except BaseException:  # noqa: BLE001 - whatever ended the loop is the answer
        GATE.answers.put(traceback.format_exc(limit=-3))
    threading.Event().wait()


GATE, STARTED = Gate(), queue.Queue()

if __name__ == "__main__":
    main()
