# SPDX-License-Identifier: Apache-2.0
"""What a run says while it runs: metrics.jsonl, optional trackers, the progress line.

`Writer` appends one JSON object a line; after a resume it first drops what lies beyond
the step that was restored, so the file reads as if the run had never been broken.
`read` gives it back. `progress_line` is a pure function of numbers, `Progress` keeps
the clock and the terminal.

Formats: {"step": int, key: number | text | bool | null | nested}; a line with the key
"event" belongs to the timeline (start, resume, stop) and is never dropped. NaN and the
infinities are the texts "nan", "inf", "-inf", so that each line is valid JSON; `read`
turns exactly these back to floats.
Units: names say them (`tokens_per_s`, `step_s`); mfu and shares are 0 to 1; loss in
nats.
Invariants: every line in the file is whole (a line cut by a crash is dropped and
counted when the file is opened again); floats are written with all their digits, so
equal losses are equal bytes; a tracker that fails is switched off, told once, and never
stops training.
Raises: config.InputError for an unreadable line, a full disk, an unknown tracker.
"""

import collections
import contextlib
import errno
import io
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from qwen_jax import config

Tracker = Callable[[int, dict], None]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_log = logging.getLogger(__name__)


class Writer:
    """The open metrics.jsonl of one run.

    Args:
      path: file to append to; made with its folder when missing.
      trackers: functions of (step, values), each called after the line is written.
      resume_step: lines of later steps are dropped (events stay); None drops none.
    Attributes:
      dropped, torn: lines dropped for their step, and for not being whole.
    """

    def __init__(
        self,
        path: pathlib.Path | str,
        trackers: Iterable[Tracker] = (),
        resume_step: int | None = None,
    ):
        self.path = pathlib.Path(path)
        self._trackers = list(trackers)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.dropped, self.torn = _rewind(self.path, resume_step)
            self._file = io.FileIO(self.path, "ab")  # a line is one write
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append {"step": step, **values}; numbers may be NumPy or device scalars."""
        row = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
        line = json.dumps(_spell(row), allow_nan=False).encode() + b"\n"
        end = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):  # take back the part that was written
                os.ftruncate(self._file.fileno(), end)
            raise _disk_error(self.path, error) from error
        for tracker in list(self._trackers):
            self._call(tracker, tracker, row["step"], row)

    def _call(self, tracker: Tracker, function: Callable, *args) -> None:
        """function(*args); a tracker that fails in any way is told of and let go."""
        try:
            function(*args)
        except Exception:  # noqa: BLE001 - a tracker never stops training
            self._trackers.remove(tracker)
            name = getattr(tracker, "__name__", type(tracker).__name__)
            _log.exception("tracker %s failed and is off, training goes on", name)

    def close(self) -> None:
        """Close the file, and each tracker that has a `close`."""
        self._file.close()
        for tracker in list(self._trackers):
            self._call(tracker, getattr(tracker, "close", lambda: None))
        self._trackers = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _disk_error(path: pathlib.Path, error: OSError) -> config.InputError:
    return config.InputError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose "
        "another folder, then give the same command again to go on"
    )


def _rewind(path: pathlib.Path, resume_step: int | None) -> tuple[int, int]:
    """Drop torn lines and steps after resume_step: all, or (killed, full disk) none."""
    if not path.exists():
        return 0, 0
    dropped = torn = 0
    rewound = path.with_name(path.name + ".rewound")
    with open(path, "rb") as old, open(rewound, "wb") as new:
        for line in old:
            row = _parse(line)
            if row is None:
                torn += 1
            elif resume_step is not None and _beyond(row, resume_step):
                dropped += 1
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(rewound, path)
    return dropped, torn


def _beyond(row: dict, resume_step: int) -> bool:
    return "event" not in row and row.get("step", 0) > resume_step


def _parse(line: bytes) -> dict | None:
    """The row of a whole line, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:  # also a line that is not UTF-8
        return None
    return _unspell(row) if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """NumPy and device scalars -> Python numbers; containers likewise."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if hasattr(value, "item") else value


def _spell(value: Any) -> Any:
    """Non-finite floats as text."""
    if isinstance(value, dict):
        return {k: _spell(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spell(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _unspell(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unspell(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unspell(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def scan(path: pathlib.Path | str) -> tuple[list[dict], list[int]]:
    """(whole rows in file order, numbers of the lines that are not whole)."""
    rows, bad = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = _parse(line)
            if row is None:
                bad.append(number)
            else:
                rows.append(row)
    return rows, bad


def read(path: pathlib.Path | str) -> list[dict]:
    """Every row of a metrics.jsonl, also of a run that is still writing.

    Raises:
      config.InputError: no such file, or a broken line that is not the last.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise config.InputError(
            f"{path}: no such file; a run folder has its metrics in metrics.jsonl"
        )
    rows, bad = scan(path)
    if bad and bad[0] < len(rows) + len(bad):
        raise config.InputError(
            f"{path}: line {bad[0]} is not a JSON object; remove that line"
        )
    return rows


def trackers(names: Iterable[str], workdir: pathlib.Path | str) -> list[Tracker]:
    """The trackers of these names, writing below `workdir`."""
    makers = {"tensorboard": TensorBoard}
    unknown = [name for name in names if name not in makers]
    if unknown:
        hint = config.nearest(unknown[0], makers)
        raise config.InputError(f"tracker {unknown[0]!r} is not known{hint}")
    return [makers[name](workdir) for name in names]


class TensorBoard:
    """Tracker writing TensorBoard event files to workdir/tensorboard."""

    def __init__(self, workdir: pathlib.Path | str):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise config.InputError(
                "tracker 'tensorboard' needs the extra: pip install "
                "'qwen_jax[tensorboard]'"
            ) from error
        folder = pathlib.Path(workdir) / "tensorboard"
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = event_file_writer.EventFileWriter(str(folder), flush_secs=10)

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = {
            k: float(v)
            for k, v in values.items()
            if k != "step" and isinstance(v, int | float)
        }
        summary = self._summary(
            value=[
                self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()
            ]
        )
        if scalars:
            event = self._event(wall_time=time.time(), step=step, summary=summary)
            self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


def duration(seconds: float) -> str:
    """45s, 3m20s, 1h02m, 2d03h; "--" for what is not a finite time."""
    if not math.isfinite(seconds) or seconds < 0:
        return "--"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def count(number: float) -> str:
    """Three digits and a letter: 950, 12.3k, 4.56M, 7.89B."""
    if not math.isfinite(number):
        return "--"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + letter
    return f"{number:.0f}"


def progress_line(
    step: int,
    num_steps: int,
    values: Mapping[str, Any],
    *,
    seconds_per_step: float = math.nan,
    checkpoint: tuple[int, float] | None = None,
    columns: int | None = None,
) -> str:
    """One line on where the run stands.

    Args:
      step, num_steps: updates made, and to be made.
      values: any of loss, bits_per_byte, tokens_per_s, mfu, skipped_steps.
      seconds_per_step: for the time left; "--" where it is not known yet.
      checkpoint: (step of the last finished checkpoint, its age in seconds).
      columns: width to fit in; parts fall away from the least to the most important.
    """
    digits, share = len(str(num_steps)), 100 * step / max(num_steps, 1)
    left = max(num_steps - step, 0)
    eta = duration(left * seconds_per_step) if left else "0s"
    parts = [(0, f"step {step:>{digits}}/{num_steps} ({share:3.0f}%)")]
    if "loss" in values:
        parts.append((1, f"loss {values['loss']:.3f}"))
    if "bits_per_byte" in values:
        parts.append((3, f"{values['bits_per_byte']:.3f} bits/byte"))
    if "tokens_per_s" in values:
        parts.append((4, f"{count(values['tokens_per_s'])} tok/s"))
    mfu = values.get("mfu")
    if mfu is not None and math.isfinite(mfu):
        parts.append((6, f"mfu {100 * mfu:.1f}%"))
    parts.append((2, f"eta {eta}"))
    if checkpoint is not None:
        parts.append((5, f"saved {checkpoint[0]} ({duration(checkpoint[1])} ago)"))
    if values.get("skipped_steps"):
        parts.append((3, f"skipped {values['skipped_steps']}"))
    while columns is not None and len(parts) > 1 and _width(parts) > columns:
        parts.remove(max(parts))
    line = " | ".join(text for _, text in parts)
    return line if columns is None else line[: max(columns, 0)]


def _width(parts: list[tuple[int, str]]) -> int:
    return sum(len(text) + 3 for _, text in parts) - 3


class Progress:
    """Prints `progress_line`: rewrites one line on a terminal, plain lines elsewhere.

    Args:
      num_steps: length of the run.
      stream: where to print; standard output by default.
      every_s: seconds between plain lines (the first and the last step always print).
      clock: monotonic seconds, an argument so that tests own the time.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps, self._clock = num_steps, clock
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        self._every_s = 0.1 if self._tty else every_s
        self._marks: collections.deque = collections.deque()  # (time, step)
        self._printed_s = -math.inf
        self._saved: tuple[int, float] | None = None
        self._open = False  # a rewritten line waits for its newline

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell that `step` updates are made; prints when it is time to."""
        now = self._clock()
        # Rate over the last minute at least: the first mark is set when the first step
        # is done, so its compilation is in no estimate.
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > 60:
            self._marks.popleft()
        due = now - self._printed_s >= self._every_s or step >= self._num_steps
        if not due:
            return
        (then, first), (_, last) = self._marks[0], self._marks[-1]
        rate = (now - then) / (last - first) if last > first else math.nan
        saved = None if self._saved is None else (self._saved[0], now - self._saved[1])
        line = progress_line(
            step,
            self._num_steps,
            values,
            seconds_per_step=rate,
            checkpoint=saved,
            columns=shutil.get_terminal_size().columns - 1 if self._tty else None,
        )
        self._printed_s = now
        self._print("\r" + line + "\x1b[K" if self._tty else line + "\n")
        self._open = self._tty

    def saved(self, step: int) -> None:
        """Tell that the checkpoint of `step` is finished."""
        self._saved = (step, self._clock())

    def message(self, text: str) -> None:
        """Print a line of its own (a sample, an evaluation) above the progress."""
        self.close()
        self._print(text + "\n")

    def close(self) -> None:
        """End a rewritten line; safe to call again."""
        if self._open:
            self._print("\n")
            self._open = False

    def _print(self, text: str) -> None:
        # a terminal that went away (ssh, a closed pipe) must not stop training
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
