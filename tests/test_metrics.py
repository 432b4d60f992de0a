# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl across crashes and resumes, trackers, and the progress line."""

import errno
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import config, metrics


def write_steps(path, steps, **kwargs):
    with metrics.Writer(path, **kwargs) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / (step + 1)})
    return writer


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    loss = np.float32(2.3456789)
    rows = [
        {"loss": loss, "tokens": np.int64(2**40), "epoch": 0.5, "note": "ü\n<b>"},
        {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "ok": True},
        {
            "event": "stop",
            "counters": {"bad": {"utf8": np.int32(3)}, "x": [1, math.inf]},
        },
    ]
    with metrics.Writer(path) as writer:
        for step, row in enumerate(rows):
            writer.write(np.int32(step), row)
    got = metrics.read(path)
    assert got[0] == {"step": 0} | rows[0] and np.float32(got[0]["loss"]) == loss
    assert math.isnan(got[1].pop("loss"))
    assert got[1] == {"step": 1, "grad_norm": math.inf, "lr": -math.inf, "ok": True}
    assert got[2]["counters"] == {"bad": {"utf8": 3}, "x": [1, math.inf]}
    for line in path.read_text().splitlines():  # strict JSON: no bare NaN
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


def test_a_line_is_in_the_file_before_write_returns(tmp_path):
    """What a SIGKILL right after write leaves behind."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from qwen_jax import metrics\n"
        "w = metrics.Writer(sys.argv[1]); w.write(1, {'loss': 2.0}); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}]


def test_resume_equals_never_stopped(tmp_path):
    """Bytes after kill at 8 and resume from 5 are those of an unbroken run."""
    unbroken, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_steps(unbroken, range(10))
    write_steps(broken, range(8))
    with open(broken, "ab") as file:
        file.write(b'{"step": 8, "lo')  # cut by the kill
    writer = write_steps(broken, range(6, 10), resume_step=5)
    assert (writer.dropped, writer.torn) == (2, 1)
    assert broken.read_bytes() == unbroken.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_events_outlive_a_rewind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Writer(path) as writer:
        writer.write(0, {"event": "start"})
        writer.write(7, {"loss": 1.0})
        writer.write(7, {"event": "stop"})
    writer = metrics.Writer(path, resume_step=3)
    writer.close()
    assert [row.get("event") for row in metrics.read(path)] == ["start", "stop"]
    assert writer.dropped == 1


@given(
    steps=st.lists(st.integers(0, 30), max_size=20),
    resume=st.none() | st.integers(0, 30),
    cut=st.integers(0, 40),
)
def test_rewind_keeps_exactly_the_whole_lines_up_to_the_step(
    tmp_path_factory, steps, resume, cut
):
    path = tmp_path_factory.mktemp("rewind") / "metrics.jsonl"
    write_steps(path, steps)
    data = path.read_bytes()
    data = data[: max(len(data) - cut, 0)]
    path.write_bytes(data)
    whole = [json.loads(line)["step"] for line in data.split(b"\n")[:-1]]
    kept = [s for s in whole if resume is None or s <= resume]
    writer = metrics.Writer(path, resume_step=resume)
    writer.write(99, {})
    writer.close()
    assert [row["step"] for row in metrics.read(path)] == [*kept, 99]
    assert writer.dropped == len(whole) - len(kept)
    assert writer.torn == (not data.endswith(b"\n") and bool(data))


def test_read_of_a_broken_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    assert metrics.read(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(config.InputError, match="line 2"):
        metrics.read(path)
    assert metrics.scan(path) == ([{"step": 1}, {"step": 2}], [2])
    with pytest.raises(config.InputError, match=r"none\.jsonl"):
        metrics.read(tmp_path / "none.jsonl")


def test_a_full_disk_is_told_and_costs_no_earlier_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.Writer(path)
    writer.write(1, {"loss": 1.0})
    half = io.FileIO.write

    class Full(io.FileIO):
        def write(self, data):
            return half(self, data[:5])  # what the kernel does with 5 bytes left

    writer._file.close()
    writer._file = Full(path, "ab")
    with pytest.raises(config.InputError, match=os.strerror(errno.ENOSPC)):
        writer.write(2, {"loss": 1.0})
    writer.close()
    assert path.read_bytes() == b'{"step": 1, "loss": 1.0}\n'


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(config.InputError, match="cannot be written"):
        metrics.Writer(tmp_path / "file" / "metrics.jsonl")


def test_a_failing_tracker_is_told_once_and_stops_nothing(tmp_path, caplog):
    seen, closed = [], []

    class Good:
        def __call__(self, step, values):
            seen.append((step, values["loss"]))

        def close(self):
            closed.append(True)
            raise ValueError("at the end")

    def broken(step, values):
        raise ConnectionError("no route")

    with metrics.Writer(tmp_path / "m.jsonl", [broken, Good()]) as writer:
        for step in range(3):
            writer.write(step, {"loss": np.float32(0.5)})
    assert seen == [(0, 0.5), (1, 0.5), (2, 0.5)] and closed == [True]
    assert len(metrics.read(tmp_path / "m.jsonl")) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert ["broken" in messages[0], "Good" in messages[1]] == [True, True]
    assert len(messages) == 2 and "no route" in caplog.text


def test_tensorboard_holds_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    trackers = metrics.trackers(["tensorboard"], tmp_path)
    with metrics.Writer(tmp_path / "m.jsonl", trackers) as writer:
        for step in range(3):
            writer.write(step, {"loss": 3.0 - step, "event": "x", "bad": math.nan})
    folder = str(tmp_path / "tensorboard")
    events = event_accumulator.EventAccumulator(folder).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "bad"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (0, 3.0),
        (1, 2.0),
        (2, 1.0),
    ]


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(config.InputError, match="did you mean 'tensorboard'"):
        metrics.trackers(["tensorbord"], tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(config.InputError, match=r"qwen_jax\[tensorboard\]") as caught:
        metrics.trackers(["tensorboard"], tmp_path)
    assert "\n" not in str(caught.value)


def test_importing_metrics_imports_nothing_heavy():
    code = (
        "import sys, qwen_jax.metrics\n"
        "heavy = {'jax', 'numpy', 'orbax', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


VALUES = {"loss": 2.34567, "bits_per_byte": 1.2, "tokens_per_s": 12345.6, "mfu": 0.412}


def test_progress_line_whole():
    line = metrics.progress_line(
        42, 1000, VALUES, seconds_per_step=0.5, checkpoint=(40, 75.0)
    )
    assert line == (
        "step   42/1000 (  4%) | loss 2.346 | 1.200 bits/byte | 12.3k tok/s | "
        "mfu 41.2% | eta 7m59s | saved 40 (1m15s ago)"
    )


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_progress_line_never_shows_a_time_that_is_none(rate):
    values = {"loss": 1.0, "tokens_per_s": math.nan, "mfu": math.inf}
    line = metrics.progress_line(
        3, 10, values, seconds_per_step=rate, checkpoint=(1, math.inf)
    )
    assert "eta --" in line and "nan" not in line and "inf" not in line
    assert metrics.progress_line(10, 10, {}, seconds_per_step=rate).endswith("eta 0s")


def test_progress_line_drops_the_least_important_first():
    def at(columns):
        return metrics.progress_line(
            42, 1000, VALUES, seconds_per_step=1, checkpoint=(40, 1.0), columns=columns
        )

    kept = [[w in at(c) for w in ("mfu", "saved", "tok/s", "eta", "loss", "step")]
            for c in (200, 100, 80, 66, 50, 38, 25)]  # fmt: skip
    counts = [sum(row) for row in kept]
    assert counts == sorted(counts, reverse=True) and counts[0] == 6 and counts[-1] == 1
    assert all(row == sorted(row) for row in kept)
    assert at(10) == "step   42/" and at(0) == ""


@given(
    step=st.integers(0, 10**9),
    num_steps=st.integers(0, 10**9),
    columns=st.integers(0, 200),
    value=st.floats(),
)
def test_progress_line_always_fits(step, num_steps, columns, value):
    line = metrics.progress_line(
        step,
        num_steps,
        dict.fromkeys(VALUES, value) | {"skipped_steps": 3},
        seconds_per_step=value,
        checkpoint=(step, value),
        columns=columns,
    )
    assert len(line) <= columns and "\n" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.7, "1h00m"), (90000, "1d01h")],
)
def test_durations(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.00k"), (123456, "123k"), (7.891e9, "7.89B")],
)
def test_counts(number, text):
    assert metrics.count(number) == text


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_every_few_seconds():
    clock, stream = Clock(), io.StringIO()
    progress = metrics.Progress(100, stream=stream, every_s=10, clock=clock)
    clock.now += 30  # the first step compiles
    for step in range(1, 101):
        progress.update(step, {"loss": 1.0})
        if step == 50:
            progress.saved(50)
        clock.now += 1
    lines = stream.getvalue().splitlines()
    assert [int(line[5:9].strip().split("/")[0]) for line in lines] == [
        *range(1, 101, 10),
        100,
    ]
    assert "eta --" in lines[0]
    assert "eta 1m29s" in lines[1]  # 89 steps of one second, compilation not counted
    assert "saved 50 (1s ago)" in lines[5] and "saved" not in lines[4]
    assert "\r" not in stream.getvalue() and "eta 0s" in lines[-1]


def test_rate_is_of_the_last_minute():
    clock, stream = Clock(), io.StringIO()
    progress = metrics.Progress(1000, stream=stream, every_s=0, clock=clock)
    for step in range(1, 200):
        progress.update(step, {})
        clock.now += 10 if step < 100 else 1
    assert "eta 13m21s" in stream.getvalue().splitlines()[-1]  # 801 steps of 1 s


def test_terminal_line_is_rewritten_and_messages_stand_above(monkeypatch):
    monkeypatch.setenv("COLUMNS", "41")
    clock, stream = Clock(), Terminal()
    progress = metrics.Progress(10, stream=stream, clock=clock)
    for step in (1, 2, 3):
        progress.update(step, VALUES)
        clock.now += 1
    progress.message("sample: hello")
    progress.update(10, VALUES)
    progress.close()
    progress.close()
    text = stream.getvalue()
    first, rest = text.split("\n", 1)
    assert first.count("\r") == 3 and all(
        len(part.removesuffix("\x1b[K")) <= 40 for part in first.split("\r")
    )
    assert rest.startswith("sample: hello\n\rstep 10/10") and rest.endswith("\x1b[K\n")


def test_a_stream_that_went_away_stops_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "gone")

    closed = io.StringIO()
    for progress in [metrics.Progress(10, stream=s) for s in (Gone(), closed)]:
        closed.close()
        progress.update(1, VALUES)
        progress.message("x")
        progress.close()
