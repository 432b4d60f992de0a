# SPDX-License-Identifier: Apache-2.0
"""Candidates measured in turns: each in a process of its own, one computing at a time.

Source: this project. A machine's speed drifts (clock, heat, neighbours), so numbers of
separate runs say little about ratios. Here every round gives each candidate one turn of
a few steps in a new random order, ratios are taken inside a round, and the median over
rounds is reported with its spread. A turn begins with a step that is not counted: the
memory of a process that has waited is cold (a machine may have split its huge pages or
reclaimed them), which costs up to a step's time and no training run ever sees.
Formats: children speak the JSON lines of peers/line.py.
Units: seconds; `others` is the share of all cores that other processes took in a turn.
Invariant: a child that is not in its turn waits on a pipe and takes no time.
Raises: ChildError with the child's own words when it fails, dies or is silent too long.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import select
import statistics
import subprocess
import tempfile
import time


class ChildError(RuntimeError):
    """A candidate failed; the message says how, the trace is in `trace`."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


class Child:
    """A handle on one candidate's process."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        # Closed in `close`, with the process that writes to it.
        self.noise = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.noise,
                env=os.environ | environment,
            )
        except OSError as error:
            self.noise.close()
            raise ChildError(f"does not start: {error}") from error
        self.rest = b""

    def ask(self, request: dict, timeout_s: float) -> dict:
        """Send one request and wait for its answer.

        Raises:
          ChildError: the child said so, ended, or did not answer in time.
        """
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise ChildError(f"ended early: {self._last_words()}") from error
        answer = json.loads(self._line(timeout_s))
        if not answer.pop("ok"):
            raise ChildError(answer["error"], answer["trace"])
        return answer

    def _line(self, timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s
        while b"\n" not in self.rest:
            left = max(0.0, until - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildError(f"no answer in {timeout_s:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise ChildError(f"ended: {self._last_words()}")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self.process.wait()
        self.noise.seek(0)
        lines = [x.strip() for x in self.noise.read().splitlines() if x.strip()]
        return f"exit code {code}" + (f", {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.noise.close()


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one candidate: `steps` steps in `seconds`."""

    name: str
    round: int
    steps: int
    seconds: float
    cpu_s: float
    others: float
    losses: tuple[float, ...]

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


def measure(
    children: dict[str, Child],
    steps: dict[str, int],
    rounds: int,
    *,
    timeout_s: float,
    say=lambda text: None,
    seconds_left=lambda: float("inf"),
) -> list[Turn]:
    """`rounds` rounds of one turn each.

    Args:
      children: name -> a child that has been built.
      steps: name -> steps in a turn.
      rounds: number of rounds; fewer when `seconds_left()` falls to zero, at least one.
      timeout_s: longest silence of a child.
      say: told about every round.
      seconds_left: how long measuring may go on.
    Returns:
      all turns in the order in which they were made.
    """
    turns = []
    names, draw = list(children), random.Random(0)
    for number in range(rounds):
        if number and seconds_left() <= 0:
            break
        for name in draw.sample(names, len(names)):
            children[name].ask({"do": "steps", "n": 1}, timeout_s)
            busy = busy_s()
            answer = children[name].ask({"do": "steps", "n": steps[name]}, timeout_s)
            busy = None if busy is None else busy_s() - busy
            turns.append(_turn(name, number, steps[name], answer, busy))
        mine = [t for t in turns if t.round == number]
        say(
            f"round {number + 1}: "
            + ", ".join(f"{t.name} {t.step_s:.3g}" for t in mine)
        )
    return turns


def _turn(name, number, steps, answer, busy) -> Turn:
    others = 0.0
    if busy is not None:
        capacity = answer["seconds"] * (os.cpu_count() or 1)
        others = max(0.0, busy - answer["cpu_s"]) / capacity
    return Turn(
        name,
        number,
        steps,
        answer["seconds"],
        answer["cpu_s"],
        others,
        tuple(answer["losses"]),
    )


def busy_s() -> float | None:
    """Seconds all cores have worked since boot; None where nothing tells."""
    path = pathlib.Path("/proc/stat")
    if not path.is_file():
        return None
    fields = [int(x) for x in path.read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, *stolen = fields
    ticks = user + nice + system + irq + softirq + sum(stolen[:1])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds a step over the rounds, and the worth of the measurement."""

    rounds: int
    median_s: float
    least_s: float
    most_s: float
    mean_s: float
    cpu_s: float
    others: float
    last_loss: float | None


def summarize(turns: list[Turn], name: str) -> Summary:
    """Median, extremes and mean of one candidate's turns."""
    mine = [turn for turn in turns if turn.name == name]
    times = [turn.step_s for turn in mine]
    return Summary(
        rounds=len(mine),
        median_s=statistics.median(times),
        least_s=min(times),
        most_s=max(times),
        mean_s=sum(t.seconds for t in mine) / sum(t.steps for t in mine),
        cpu_s=statistics.median(t.cpu_s / t.steps for t in mine),
        others=statistics.median(t.others for t in mine),
        last_loss=mine[-1].losses[-1] if mine[-1].losses else None,
    )


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster `name` is than `base`: median of rounds, quartiles."""

    median: float
    low: float
    high: float


def compared(turns: list[Turn], name: str, tokens: int) -> dict:
    """A candidate's times as a record: its rate where a step gives so many tokens, and
    how much faster it is than each other one that took turns."""
    time_s = summarize(turns, name)
    others = {turn.name for turn in turns} - {name}
    return {
        "time": dataclasses.asdict(time_s),
        "tokens_per_s": tokens / time_s.median_s,
        "faster_than": {
            base: dataclasses.asdict(ratio(turns, name, base)) for base in others
        },
    }


def ratio(turns: list[Turn], name: str, base: str) -> Ratio:
    """base's seconds / name's seconds, taken inside each round."""
    by_round: dict[int, dict[str, float]] = {}
    for turn in turns:
        by_round.setdefault(turn.round, {})[turn.name] = turn.step_s
    found = sorted(
        r[base] / r[name] for r in by_round.values() if base in r and name in r
    )
    if len(found) == 1:
        return Ratio(found[0], found[0], found[0])
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(middle, low, high)
